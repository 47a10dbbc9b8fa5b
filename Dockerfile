# ssljax on CPUs, NVIDIA GPUs or TPU VMs:
#   docker build --build-arg ACCELERATOR=cuda13 -t ssljax .   GPUs
#   docker build --build-arg ACCELERATOR=tpu -t ssljax .      TPU VMs
#   docker build -t ssljax .                                  CPUs
#   docker run --rm -v "$PWD/runs:/runs" ssljax madnn --workdir=/runs/digits
# Add --gpus=all on GPUs, and --privileged --net=host on TPU VMs. The wheels of
# JAX bring CUDA, so that the image needs the driver of the host alone.
FROM python:3.13-slim

ARG ACCELERATOR=""
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY ssljax ssljax
COPY experiments experiments
# hadolint ignore=DL3013  # pyproject.toml has the versions
RUN pip install ".[embed,export,label,parquet]" \
  && if [ -n "$ACCELERATOR" ]; then pip install "jax[$ACCELERATOR]"; fi \
  && rm -rf build

RUN useradd --create-home --uid 1000 user && mkdir /runs && chown user /runs
USER 1000
WORKDIR /runs
ENTRYPOINT ["ssljax"]
CMD ["--help"]

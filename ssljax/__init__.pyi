from ssljax import core as core
from ssljax import losses as losses
from ssljax import methods as methods
from ssljax import neighbours as neighbours
from ssljax import networks as networks
from ssljax import optimizers as optimizers
from ssljax import registry as registry
from ssljax.api import Evaluation as Evaluation
from ssljax.api import Model as Model
from ssljax.api import fit as fit
from ssljax.api import load as load
from ssljax.config import Config as Config
from ssljax.config import register_method as register_method
from ssljax.data import datasets as _datasets
from ssljax.data.splits import draw_split as draw_split
from ssljax.errors import InputError as InputError
from ssljax.estimator import Classifier as Classifier
from ssljax.registry import register_augmentation as register_augmentation
from ssljax.registry import register_network as register_network

load_data = _datasets.load

__version__: str
__all__: list[str]

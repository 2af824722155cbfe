"""LEGO: train a transformer in stages of layers, and let each token leave at the first exit that is confident.

`__init__.pyi` lists the public names. Each is imported on first use, so that `import ease` alone does not load torch.
"""

import lazy_loader

from ease.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

if not __name__.startswith("visplice."):
    raise ImportError("import visplice.train, not train: the folders of the repository are subpackages of visplice")

from visplice.vision._torchvision import declare_missing_operators

declare_missing_operators()  # before the first import of Lightning, which imports torchvision

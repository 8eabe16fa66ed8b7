if not __name__.startswith("visplice."):
    raise ImportError("import visplice.vision, not vision: the folders of the repository are subpackages of visplice")

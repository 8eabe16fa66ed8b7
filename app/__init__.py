if not __name__.startswith("visplice."):
    raise ImportError("import visplice.app, not app: the folders of the repository are subpackages of visplice")

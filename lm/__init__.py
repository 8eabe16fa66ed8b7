if not __name__.startswith("visplice."):
    raise ImportError("import visplice.lm, not lm: the folders of the repository are subpackages of visplice")

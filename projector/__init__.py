if not __name__.startswith("visplice."):
    raise ImportError(
        "import visplice.projector, not projector: the folders of the repository are subpackages of visplice"
    )

"""visplice as a model of lmms-eval: `lmms-eval --model visplice --model_args pretrained=DIR`, see docs/lmms-eval.md.

`arguments` reads the model's arguments, `requests` answers what the harness asks, `models` are the two classes that it
opens. lmms-eval calls `manifest` whenever it starts, for other models too, so nothing heavy is imported here.
"""

from typing import Any

if not __name__.startswith("visplice."):
    raise ImportError("import visplice.app, not app: the folders of the repository are subpackages of visplice")


def manifest() -> Any:
    """What lmms-eval finds under the entry point `lmms_eval.models`: the classes of both its interfaces."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="visplice",
        simple_class_path="visplice.app.lmms.models.VispliceSimple",
        chat_class_path="visplice.app.lmms.models.VispliceChat",
    )

"""`visplice chat`: image chat in the browser. One process, and nothing goes to or comes from the network.

The page keeps no state of its own: every tab has its `Session`, which the handlers change in place, and what the page
shows is always computed from it.
"""

from __future__ import annotations

import argparse
import html
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # read as Gradio is imported; also its look for a newer version

import gradio as gr
from PIL import Image

from visplice.app.conversation import Session, answer, ask, explain, set_picture, shown, start_over, stop
from visplice.app.device import pick_device, pick_dtype
from visplice.app.make_examples import EXAMPLES, assets
from visplice.lm.extension import EMBEDDED, load_extension, read_extension
from visplice.lm.generate import Sampling
from visplice.lm.vision_llama import VisionLlama
from visplice.train import scene_words, scenes, slips
from visplice.vision.image import ImageError, open_image

PREVIEW = 1024  # longest side of the picture that is sent back to the page, pixels
_LOOK = {  # where the page differs from Gradio's theme, by day and by night
    "block_border_width": "1px",
    "block_label_text_color": "*body_text_color_subdued",
    "block_title_background_fill": "transparent",
    "block_title_text_color": "*body_text_color",
}
NEW_TOKENS = 128  # what an answer may have unless the slider is moved


def open_upload(upload: Mapping[str, Any]) -> Image.Image:
    """Opens what the page uploaded; its message says the file's name instead of where the server keeps it.

    Raises:
        ImageError: see `open_image`.
    """
    path = str(upload.get("path") or "")
    try:
        return open_image(path)
    except ImageError as error:
        raise ImageError(str(error).replace(path, Path(path).name)) from error


def preview(image: Image.Image | None) -> Image.Image | None:
    """The picture as the page shows it, also of formats that browsers cannot draw."""
    if image is None or max(image.size) <= PREVIEW:
        return image
    small = image.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    return small


def shapes_note() -> str:
    """What the model of the embedded task knows, in Markdown."""
    rows = [
        (f"{len(scenes.COLORS)} colors", scenes.COLORS),
        (f"{len(scenes.SHAPES)} shapes", scenes.SHAPES),
        (f"{len(scenes.SIZES)} sizes", scenes.SIZES),
        (f"{len(scenes.POSITIONS)} positions", scenes.POSITIONS),
        (f"{len(scenes.BACKGROUNDS)} backgrounds", scenes.BACKGROUNDS),
    ]
    return "\n".join(
        [
            "This small model knows pictures of one to four colored shapes, small printed slips, and nothing else:",
            "",
            *(f"- **{label}:** {', '.join(names)}" for label, names in rows),
            "",
            "Ask about color, shape, number, existence, position, or compare two shapes; or write "
            f"“{scene_words.DESCRIBE[0]}” or “{scene_words.TELL}”",
            "",
            "- **slips:** receipts and labels in capitals, like the last example; ask for the shop, the price of a "
            f"thing, or what stands behind {', '.join(slips.KEYS)}",
            "",
            "`visplice chat --model FOLDER` opens another model.",
        ]
    )


def model_note(folder: str, *, vision_tower: str | None = None, model_base: str | None = None) -> str:
    """Names the parts of a model that was opened from a folder, in Markdown; arguments as for `read_extension`."""
    extension = read_extension(folder, vision_tower=vision_tower, model_base=model_base)
    encoder = extension.encoder
    weights = "" if encoder.weights in (None, "pretrained") else f", weights `{encoder.weights}`"
    return f"- **Model:** `{folder}`\n- **Encoder:** `{encoder.model}`{weights}\n- **Decoder:** `{extension.lm}`"


def create_app(model: VisionLlama, *, title: str, note: str, seed: int | None = None) -> gr.Blocks:
    """Builds the page; `note` is Markdown, and `seed` fixes what sampling draws."""
    hints = (scene_words.DESCRIBE[0], scene_words.TELL, "How many shapes are there?", "Is there a circle?")
    most = max(1, model.lm.config.max_seq_len // 2)
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        session = gr.State(Session())
        gr.Markdown(
            f"# {title}\nChoose a picture and ask about it. A new picture begins a new conversation.", elem_id="title"
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=340):
                picture = gr.Image(
                    label="Picture",
                    show_label=False,
                    sources=["upload", "clipboard", "webcam"],
                    format="png",
                    height=320,
                    buttons=[],
                    elem_id="picture",
                )
                examples = gr.Dataset(
                    label="Example pictures",
                    components=[gr.Image(visible=False)],
                    samples=[[str(assets() / example.name)] for example in EXAMPLES],
                    type="index",
                    elem_id="examples",
                )
                with gr.Accordion("About this model", open=True, elem_id="note"):
                    gr.Markdown(note)
            with gr.Column(scale=6, min_width=420):
                chat = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height=520,
                    # Plain text: Markdown in an answer could make the browser fetch a picture from anywhere.
                    render_markdown=False,
                    placeholder="Answers appear here.",
                    buttons=[],
                    feedback_options=None,
                    elem_id="chat",
                )
                question = gr.Textbox(
                    show_label=False,
                    container=False,
                    placeholder="Ask about the picture",
                    max_lines=4,
                    elem_id="question",
                )
                with gr.Row(elem_id="buttons"):
                    send = gr.Button("Send", variant="primary", min_width=80)
                    halt = gr.Button("Stop", interactive=False, min_width=80)
                    fresh = gr.Button("New conversation", min_width=80)
                chips = gr.Dataset(
                    label="Questions to begin with",
                    components=[gr.Textbox(visible=False)],
                    samples=[[hint] for hint in hints],
                    elem_id="chips",
                )
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 takes the likeliest")
                    top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="1 leaves nothing out")
                    length = gr.Slider(1, most, value=min(NEW_TOKENS, most), step=1, label="Max new tokens")

        def view(state: Session) -> dict[Any, Any]:
            busy = state.current is not None
            return {chat: shown(state), send: gr.Button(interactive=not busy), halt: gr.Button(interactive=busy)}

        def on_picture(upload: Mapping[str, Any] | None, state: Session) -> dict[Any, Any]:
            try:
                image = None if upload is None else open_upload(upload)
            except ImageError as error:
                gr.Warning(html.escape(str(error)), duration=30)
                return {picture: preview(state.image)}
            set_picture(state, image)
            return {picture: preview(image), **view(state)}

        def on_example(index: int, state: Session) -> dict[Any, Any]:
            set_picture(state, open_image(assets() / EXAMPLES[index].name))
            return {picture: state.image, question: EXAMPLES[index].question, **view(state)}

        def on_send(text: str, temperature: float, top_p: float, length: float, state: Session) -> dict[Any, Any]:
            sampling = Sampling(max_new_tokens=int(length), temperature=temperature, top_p=top_p, seed=seed)
            return {**view(state), question: ""} if ask(state, text, sampling) else view(state)

        def on_answer(state: Session) -> Iterator[dict[Any, Any]]:
            turn = state.current
            try:
                for _ in answer(model, state):
                    yield view(state)
            except Exception as error:  # whatever it is, the page stays usable
                if not isinstance(error, ValueError):
                    traceback.print_exc()
                gr.Warning(html.escape(explain(error, len(state.turns))), duration=30)
                yield {**view(state), question: turn.question if turn else ""}
            else:
                yield view(state)  # also when it was stopped: the conversation may be another one by now

        def on_stop(state: Session) -> dict[Any, Any]:
            stop(state)
            return view(state)

        def on_fresh(state: Session) -> dict[Any, Any]:
            start_over(state)
            return view(state)

        ours: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shows = [chat, send, halt]
        # Not preprocessed: Gradio would open the file first, and say of a broken one only that it failed.
        picture.input(on_picture, [picture, session], [picture, *shows], preprocess=False, **ours)
        examples.click(on_example, [examples, session], [picture, question, *shows], **ours)
        chips.click(lambda chip: chip[0], chips, question, **ours)
        asked = [question, temperature, top_p, length, session]
        for trigger in (send.click, question.submit):
            taken = trigger(on_send, asked, [question, *shows], **ours)
            # One answer at a time, whatever the number of tabs; the others wait in the queue.
            taken.success(on_answer, session, [question, *shows], concurrency_limit=1, concurrency_id="model", **ours)
        halt.click(on_stop, session, shows, **ours)
        for cleared in (fresh.click, chat.clear):
            cleared(on_fresh, session, shows, **ours)
    page.queue(default_concurrency_limit=8)
    return page


def launch(page: gr.Blocks, *, host: str, port: int, open_browser: bool = False) -> str:
    """Serves the page from a thread of its own; returns its address."""
    # Gradio calls its own server once as it starts, which no proxy may answer.
    reached = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "", "127.0.0.1", "localhost", host]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys(filter(None, reached)))
    theme = gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],  # Gradio's own choice may be fetched from Google
        font_mono=["ui-monospace", "monospace"],
    ).set(**{name + mode: value for name, value in _LOOK.items() for mode in ("", "_dark")})
    _, url, _ = page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=open_browser,
        inline=False,
        share=False,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=theme,
        css_paths=assets() / "chat.css",
    )
    return url


def check_port(host: str, port: int) -> None:
    """Raises ValueError when nothing can listen there; said before a model is loaded."""
    if not 0 < port < 65536:
        raise ValueError(f"--port {port} is none; ports are 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --port or --host"
        ) from error


def serve(
    model: VisionLlama,
    *,
    title: str = "visplice chat",
    note: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    seed: int | None = None,
) -> None:
    """Shows the page until Ctrl-C; `note` says in Markdown what the model is, without one it knows colored shapes.

    Raises:
        ValueError: nothing can listen on that host and port.
    """
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="visplice-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # what people upload goes when the server does
        page = create_app(model, title=title, note=note or shapes_note(), seed=seed)
        try:
            url = launch(page, host=host, port=port, open_browser=open_browser)
            print(f"{title}: {url} (Ctrl-C stops it)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        finally:
            page.close(verbose=False)


def main(args: argparse.Namespace) -> int:
    """Opens the model and shows the page; returns the exit status."""
    check_port(args.host, args.port)
    parts = {"vision_tower": args.vision_tower, "model_base": args.model_base}
    model = load_extension(args.model, device=pick_device(args.device), dtype=pick_dtype(args.dtype), **parts)
    note = None if args.model == EMBEDDED else model_note(args.model, **parts)
    serve(model, note=note, host=args.host, port=args.port, open_browser=args.open, seed=args.seed)
    return 0

from pathlib import Path

from visplice.app.memory import main_memory, size_text


def test_sizes() -> None:
    sizes = [size_text(n) for n in (0, 1023, 1024, 1536 * 1024, 3 * 1024**3)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "3.0 GiB"]


def test_main_memory_is_what_the_system_says() -> None:
    known = main_memory()
    assert (known is not None) == Path("/proc/meminfo").is_file()
    assert known is None or 0 < known[0] < known[1]

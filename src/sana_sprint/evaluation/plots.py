"""Whether plots can be drawn here, asked before there is something to draw."""


def check_plotting() -> None:
    """Raises ImportError, with what to do, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'sana-sprint[train]'") from error

"""The command line: `fastmask transfer`, `fastmask report`, `fastmask data`, `fastmask info`."""


def main() -> None:
    """Run the command line on the arguments of this process."""
    from fastmask.cli.app import app

    app(prog_name="fastmask")

"""`mvm` and `python -m mvm.cli`."""

from __future__ import annotations


def main() -> None:
    from mvm.cli.root import root

    root.main(prog_name="mvm")


if __name__ == "__main__":
    main()

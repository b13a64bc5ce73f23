"""Writes docs/settings.md, every field of the configuration: `python -m tests.settings_page`."""

import argparse
from pathlib import Path

from opcd.arguments import parser
from opcd.config.fields import GROUPS
from opcd.experience.settings import GROUP

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
FRONT = """# Every setting

A field stands in its group in a configuration file, is an option of the command line
(`--steps 100`) and an argument in Python (`steps=100`): [how they
meet](commands.md#the-configuration-file). `python -m tests.settings_page` makes this page from what
`opcd train --help` and `opcd experience --help` say.
"""
HEAD = "| field | takes | default | is |\n|---|---|---|---|\n"


def page() -> str:
    """The whole page."""
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = [FRONT]
    for command, wanted in (("train", GROUPS), ("experience", (GROUP,))):
        groups = {group.title: group for group in commands.choices[command]._action_groups}
        for name in wanted:
            group = groups[name]
            parts.append(f"\n## {name}\n\n{group.description}\n\n{HEAD}")
            for option in group._group_actions:
                words = (option.help or "").replace("%%", "%")
                text, _, default = words.partition(" (default: ")
                kind = str(option.metavar).strip("{}").replace(",", ", ")
                shown = f"`{default.removesuffix(')')}`" if default else ""
                cells = [f"`{option.dest}`", kind, shown, text]
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

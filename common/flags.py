"""Flags of the programs that parse them with argparse."""

import argparse
from typing import NoReturn

from common.errors import UserError


class FlagParser(argparse.ArgumentParser):
    """Raises UserError with one sentence for a wrong flag, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")

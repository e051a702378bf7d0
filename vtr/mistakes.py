"""Tells what a user did wrong from what is a bug."""

from __future__ import annotations

import dis

from vtr.registry import registering_packages


def is_refusal(error: BaseException) -> bool:
    """Tells whether a `raise` statement of vtr, or of a package that registered a method or host, made the error.

    Those check what was given. All else is somebody's bug: what a library below raises (transformers, torch), and what the interpreter raises in
    our own code (a failed unpacking, a wrong number of arguments). Checks raise plain `ValueError` and `TypeError`, here and in packages of others,
    so the class of an error cannot tell the two apart; the instruction at which it began can.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    package = last.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return raised and package in registering_packages()

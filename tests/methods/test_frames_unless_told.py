"""What methods for images see of a video unless told."""

from vtr.registry import list_methods, method_class

EACH = {
    "vispruner": "(N, N) cosines",
    "tokencorr": "(N, N) cosines",
    "centerclip": "(N, N) distances",
    "sparsevlm": "distances between recycled tokens, three tenths of what is pruned",
    "cdpruner": "a Cholesky row of N numbers per kept token",
    "script": "a Cholesky row of N numbers per kept token",
    "tome": "(N, N) / 4 cosines",
    "pool": "knows one grid",
    "resize": "knows one grid",
    "expedit": "knows one grid",
    "globalcom2": "knows one thumbnail",
    "hired": "knows one thumbnail",
    "flowcut": "view by view in the tower",
    "visionzip": "view by view",
    "prumerge": "view by view",
    "prumerge_plus": "view by view",
    "fastervlm": "view by view",
    "hiprune": "knows one grid",
    "mmtok": "(N, N) cosines",
    "prunesid": "(N, N) cosines",
    "scope": "(N, N) cosines",
    "vscan": "knows one grid",
}


def test_methods_whose_memory_is_not_linear_or_that_know_one_picture_see_each_frame_by_itself() -> None:
    ours = [name for name in list_methods() if method_class(name).__module__.startswith("vtr.methods.")]
    assert {name for name in ours if method_class(name).frames_unless_told == "each"} == set(EACH)

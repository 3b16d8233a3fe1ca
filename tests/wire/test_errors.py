"""The error tree: one catchable root, a code per class, and nothing of the type lost on the wire."""

from __future__ import annotations

import re

import msgpack
import pytest

from headrace import errors
from headrace.errors import HeadraceError, ServiceError, from_wire


def tree(root: type[HeadraceError] = HeadraceError) -> list[type[HeadraceError]]:
    ours = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(found for child in ours for found in tree(child))]


ALL = tree()


def test_codes_are_unique_and_plain():
    codes = [cls.code for cls in ALL]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_every_class_sets_its_own_code():
    assert all("code" in vars(cls) for cls in ALL)


def test_exports_are_the_tree():
    assert set(errors.__all__) == {cls.__name__ for cls in ALL} | {"from_wire"}
    assert errors.__all__ == sorted(errors.__all__)


def test_the_docstring_draws_the_tree():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert drawn == [cls.__name__ for cls in ALL[1:]]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_error_crosses_the_wire_whole(cls):
    error = cls("what, why, what next", param="field", retry_after=1.5, request_id="ab")
    back = from_wire(msgpack.unpackb(msgpack.packb(error.to_wire())))
    assert type(back) is cls
    assert vars(back) == vars(error)
    assert str(back) == "what, why, what next"


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_fields_that_are_not_set_are_left_out(cls):
    assert cls("x").to_wire() == {"code": cls.code, "message": "x"}
    assert vars(from_wire(cls("x").to_wire())) == vars(cls("x"))


def test_an_unknown_code_becomes_the_service_error():
    back = from_wire({"code": "of_a_newer_version", "message": "m", "param": "p", "retry_after": 2, "surprise": []})
    assert type(back) is ServiceError
    assert (back.message, back.param, back.retry_after) == ("m", "p", 2.0)
    assert not back.retryable


@pytest.mark.parametrize(
    "fields", [{}, {"code": None}, {"message": 5, "retry_after": "soon", "param": 3}, {"code": []}]
)
def test_a_malformed_error_is_still_an_error(fields):
    back = from_wire(fields)
    assert type(back) is ServiceError
    assert isinstance(back.message, str)
    assert back.message
    assert back.retry_after is None


def test_only_what_may_pass_is_retryable():
    """The final error of a request that took its workers down must not make anybody repeat it."""
    retryable = {cls.__name__ for cls in ALL if cls.retryable}
    assert retryable == {"OverloadedError", "UnavailableError", "BrokerConnectionError", "RequestTimeoutError"}


def test_errors_are_documented():
    assert all(cls.__doc__ for cls in ALL)

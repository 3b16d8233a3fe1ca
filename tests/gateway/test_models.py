"""`/v1/models`: what clients learn about the served models."""

from headrace.errors import BrokerConnectionError
from tests.gateway.helpers import error_of
from tests.support.fake_client import FakeClient, card

TWO = [card("tiny-chat"), card("acme/other-model", max_model_len=2048)]


def test_the_list_tells_what_a_picker_needs(serve):
    body = serve().http.get("/v1/models").json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert model["id"] == model["root"] == "tiny-chat"
    assert model["object"] == "model"
    assert model["created"] == 1_700_000_000
    assert model["owned_by"] == "headrace"
    assert model["max_model_len"] == 512
    assert model["sampling_defaults"] == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


def test_weights_in_8_bits_are_told(serve):
    (plain,) = serve().http.get("/v1/models").json()["data"]
    assert "quantization" not in plain
    fake = FakeClient(cards=[card("tiny-chat", dtype="bfloat16", quantization="int8")])
    (model,) = serve(fake).http.get("/v1/models").json()["data"]
    assert (model["dtype"], model["quantization"]) == ("bfloat16", "int8")


def test_no_model_is_an_empty_list_and_no_error(serve):
    assert serve(FakeClient(cards=[])).http.get("/v1/models").json() == {"object": "list", "data": []}


def test_one_model_by_its_name_which_may_hold_slashes(serve):
    http = serve(FakeClient(cards=TWO)).http
    assert http.get("/v1/models/acme/other-model").json()["max_model_len"] == 2048


def test_an_unknown_model_names_those_that_are_served(serve):
    error = error_of(serve(FakeClient(cards=TWO)).http.get("/v1/models/gone"), 404, "model_not_found")
    assert error["type"] == "not_found_error"
    assert error["param"] == "model"
    assert "tiny-chat" in error["message"]


def test_a_request_may_leave_the_model_out_if_there_is_only_one(serve):
    body = {"prompt": "hi", "max_tokens": 2}
    assert serve().post("/v1/completions", body).json()["model"] == "tiny-chat"
    error_of(serve(FakeClient(cards=TWO)).post("/v1/completions", body), 404, "model_not_found")


def test_without_a_model_a_request_may_be_repeated_later(serve):
    response = serve(FakeClient(cards=[])).post("/v1/completions", {"prompt": "hi"})
    error_of(response, 503, "unavailable")
    assert response.headers["retry-after"] == "2"
    assert response.headers["x-should-retry"] == "true"


def test_without_a_broker_the_list_says_so(serve):
    fake = FakeClient()
    fake.models_error = BrokerConnectionError("No broker answers at ipc:///x.")
    error = error_of(serve(fake).http.get("/v1/models"), 503, "no_broker")
    assert error["type"] == "server_error"

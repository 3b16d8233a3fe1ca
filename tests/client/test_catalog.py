"""The catalog asks the broker for cards and files as seldom as it can, and says plainly what is not there."""

import hashlib
import threading

import pytest

from headrace.card import CHAT_TEMPLATE, TOKENIZER
from headrace.client import catalog as catalog_module
from headrace.client.blobs import BlobCache
from headrace.client.catalog import Catalog
from headrace.errors import BrokerConnectionError, ModelFilesError, ProtocolError, UnavailableError, UnknownModelError
from headrace.messages import Blob, Describe, GetBlob
from tests.client.tiny import FILES, tiny_card

CONTENT = {hashlib.sha256(content).hexdigest(): content for content in FILES.values()}


class Broker:
    """Answers questions from its tables, and remembers them."""

    def __init__(self, *cards, chunk=100):
        self.cards = cards
        self.blobs = dict(CONTENT)
        self.chunk = chunk
        self.asked = []

    def __call__(self, question):
        self.asked.append(question)
        if isinstance(question, Describe):
            return self.cards
        assert isinstance(question, GetBlob)
        content = self.blobs[question.hash]
        part = content[question.offset : question.offset + self.chunk]
        return Blob(hash=question.hash, offset=question.offset, total=len(content), data=part)

    @property
    def described(self):
        return self.asked.count(Describe())


@pytest.fixture
def catalog_of(tmp_path):
    def make(broker, retries=0):
        return Catalog(broker, retries, BlobCache(tmp_path / "blobs"))

    return make


def test_a_text_is_fetched_in_parts_and_kept(catalog_of):
    broker = Broker(tiny_card())
    catalog = catalog_of(broker)
    assert catalog.known_text("tiny") is None
    text = catalog.text("tiny")
    assert text.decode(text.encode("hello")) == "hello"
    assert text.has_template
    assert len(broker.asked) > 10
    before = len(broker.asked)
    assert catalog.text("tiny") is catalog.text("") is catalog.known_text("tiny") is text
    assert len(broker.asked) == before


def test_the_next_start_takes_the_files_from_the_disk(catalog_of):
    catalog_of(Broker(tiny_card())).text("tiny")
    broker = Broker(tiny_card())
    catalog_of(broker).text("tiny")
    assert broker.asked == [Describe()]


def test_a_damaged_file_on_the_disk_is_fetched_again(catalog_of, tmp_path):
    catalog_of(Broker(tiny_card())).text("tiny")
    for path in (tmp_path / "blobs").iterdir():
        path.write_bytes(b"garbage")
    broker = Broker(tiny_card(), chunk=1 << 20)
    assert catalog_of(broker).text("tiny").encode("a") == [97]
    assert len(broker.asked) == 1 + len(FILES)


def test_a_card_is_asked_for_anew_after_a_while(catalog_of, monkeypatch):
    """A model replaced under its name may have another tokenizer."""
    clock = [100.0]
    monkeypatch.setattr(catalog_module.time, "monotonic", lambda: clock[0])
    broker = Broker(tiny_card())
    catalog = catalog_of(broker)
    first = catalog.text("tiny")
    clock[0] += 60
    assert catalog.known_text("tiny") is None
    assert catalog.text("tiny") is first
    assert broker.described == 2
    broker.cards = (tiny_card(fingerprint="f1"),)
    clock[0] += 60
    assert catalog.text("tiny") is not first
    assert catalog.text("tiny").card.fingerprint == "f1"


def test_texts_of_long_gone_models_are_let_go(catalog_of, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(catalog_module.time, "monotonic", lambda: clock[0])
    broker = Broker()
    catalog = catalog_of(broker)
    for version in range(20):
        clock[0] += 60
        broker.cards = (tiny_card(fingerprint=f"f{version}"),)
        catalog.text("tiny")
    assert len(catalog._texts) == 8


def test_an_unknown_model_names_the_nearest(catalog_of):
    catalog = catalog_of(Broker(tiny_card("tiny-chat"), tiny_card("other")))
    with pytest.raises(UnknownModelError, match="no model named 'tiny-chta'; did you mean 'tiny-chat'") as caught:
        catalog.text("tiny-chta")
    assert caught.value.param == "model"
    with pytest.raises(UnknownModelError, match=r"served now: other, tiny-chat\."):
        catalog.text("zzz")


def test_of_several_models_one_must_be_named(catalog_of):
    with pytest.raises(UnknownModelError, match=r"Several models are served \(a, b\); name one"):
        catalog_of(Broker(tiny_card("b"), tiny_card("a"))).text("")


def test_no_model_at_all_is_waited_for_a_little(catalog_of):
    broker = Broker()
    catalog = catalog_of(broker, retries=2)
    catalog.close()  # so that it does not really wait
    with pytest.raises(UnavailableError, match="No worker group is ready") as caught:
        catalog.text("tiny")
    assert caught.value.retryable
    assert broker.described == 3


def test_a_group_that_becomes_ready_meanwhile(catalog_of):
    class Late(Broker):
        def __call__(self, question):
            if self.described:
                self.cards = (tiny_card(),)
            return super().__call__(question)

    catalog = catalog_of(Late(), retries=1)
    catalog.close()
    assert catalog.text("tiny").card.name == "tiny"


def test_a_model_without_a_tokenizer(catalog_of):
    card = tiny_card(blobs={CHAT_TEMPLATE: "0" * 64})
    with pytest.raises(ModelFilesError, match=r"has no tokenizer\.json"):
        catalog_of(Broker(card)).text("tiny")


def test_a_malformed_hash_becomes_no_file_name(catalog_of):
    with pytest.raises(ProtocolError, match="not a sha256"):
        catalog_of(Broker(tiny_card(blobs={TOKENIZER: "../../etc/passwd"}))).text("tiny")


@pytest.mark.parametrize(
    ("total", "data"), [(10, b""), (2, b"abc"), (1 << 40, b"abc")], ids=["nothing more", "too much", "far too large"]
)
def test_parts_that_do_not_add_up(catalog_of, total, data):
    def ask(question):
        if isinstance(question, Describe):
            return (tiny_card(),)
        return Blob(hash=question.hash, offset=question.offset, total=total, data=data)

    with pytest.raises(ProtocolError, match="do not add up"):
        catalog_of(ask).text("tiny")


def test_content_that_is_not_what_its_hash_says(catalog_of):
    broker = Broker(tiny_card())
    broker.blobs = dict.fromkeys(CONTENT, b"something else")
    with pytest.raises(ProtocolError, match="damaged"):
        catalog_of(broker).text("tiny")


def test_no_thread_waits_for_the_timeout_of_another(catalog_of):
    """With a lock around the question the second of two callers without a broker waited twice as long, the third..."""
    together = threading.Barrier(8, timeout=30)

    def ask(question):
        together.wait()
        raise BrokerConnectionError("There is no broker.")

    catalog = catalog_of(ask)
    errors = []

    def call():
        try:
            catalog.text("tiny")
        except BrokerConnectionError as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 8


def test_many_threads_load_a_text_once(catalog_of):
    catalog = catalog_of(Broker(tiny_card()))
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(catalog.text("tiny"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(map(id, texts))) == 1

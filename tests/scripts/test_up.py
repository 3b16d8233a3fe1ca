"""`headrace up` with real processes and a fake engine: what one sees, and what is left when things go wrong."""

import json
import os
import signal
import socket
import threading
import urllib.error
import urllib.request

import psutil
import pytest

from headrace.client import Client
from tests.scripts.commands import Run, fake_model
from tests.support.children import gone, wait_until

pytestmark = pytest.mark.timeout(240)


def fetch(url, key=None, body=None):
    """Status and JSON of an HTTP request."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=body and json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def up(run_dir, model):
    """A pool that is ready."""
    with Run(run_dir, "up", model, "--port", "0", fake=True) as run:
        run.value("try")
        yield run


class TestStart:
    def test_once_streams_the_answer_to_stdout_and_the_rest_to_stderr(self, run_dir, model):
        arguments = ("--port", "0", "--prompt", "mill", "--max-tokens", "12", "--once", "--threads", "1")
        with Run(run_dir, "up", model, *arguments, fake=True) as run:
            run.ends_with(0)

        assert "".join(run.out).strip()
        notes = "".join(run.err)
        for expected in ("loading", "chat page", "http://127.0.0.1:", "12 tokens, ", " tok/s, first token "):
            assert expected in notes
        assert not (run_dir / "clients.sock").exists()

    def test_ready_block_names_what_can_be_used(self, up):
        page = up.value("chat page")

        assert up.value("API") == f"{page}v1"
        assert up.value("model").startswith("mill")
        assert up.value("context") == "4,096 tokens"
        assert up.value("KV cache") == "65,536 tokens, up to 8 answers at once"
        assert up.value("stop") == "Ctrl-C"
        assert up.value("try").startswith(f"curl {page}v1/completions ")

    def test_page_and_broker_answer_under_the_served_name(self, run_dir, model):
        arguments = ("--port", "0", "--served-model-name", "wheel", "--groups", "2")
        with Run(run_dir, "up", model, *arguments, fake=True) as run:
            assert fetch(run.value("API") + "/models")[1]["data"][0]["id"] == "wheel"
            with Client(f"ipc://{run_dir}/clients.sock") as client:
                assert {group["name"] for group in client.status()["groups"]} == {"group-0", "group-1"}
                assert client.generate("a", max_tokens=5).usage.completion_tokens == 5

    def test_no_gateway(self, run_dir, model):
        with Run(run_dir, "up", model, "--no-gateway", fake=True) as run:
            assert run.value("Python") == f'headrace.Client("ipc://{run_dir}/clients.sock")'
            assert "chat page" not in run.text
            assert run.child("headrace-gateway") is None

    def test_parent_loads_no_torch(self, up):
        maps = psutil.Process(up.process.pid).memory_maps()

        assert not [m.path for m in maps if "libtorch" in m.path]

    def test_api_key_is_asked_for_and_shown_nowhere(self, run_dir, model):
        key = "sk-very-secret"
        with Run(run_dir, "up", model, "--port", "0", fake=True, env={"HEADRACE_API_KEY": key}) as run:
            api = run.value("API")
            assert "$HEADRACE_API_KEY" in run.value("try")
            assert fetch(f"{api}/models")[0] == 401
            assert fetch(f"{api}/models", key=key)[0] == 200
            for pid in run.family()[1:]:
                process = psutil.Process(pid)
                assert key not in " ".join(process.cmdline())
                assert "HEADRACE_API_KEY" not in process.environ()
        assert key not in run.text


class TestRefusals:
    def test_folder_that_is_no_model(self, run_dir, tmp_path):
        with Run(run_dir, "up", tmp_path / "nothing", "--port", "0", fake=True) as run:
            run.ends_with(2)

        assert "There is no folder" in run.text
        assert "Traceback" not in run.text

    def test_model_that_cannot_be_loaded(self, run_dir, tmp_path):
        model = fake_model(tmp_path / "mill", error="files")
        with Run(run_dir, "up", model, "--port", "0", fake=True) as run:
            run.ends_with(2)

        assert run.err[-1] == "Error: model.safetensors is 7 bytes short; fetch it again.\n"

    def test_group_that_never_gets_ready(self, run_dir, tmp_path):
        """Bug of the first draft: a group that crashed while loading was started again for ever."""
        model = fake_model(tmp_path / "mill", error="exit")
        with Run(run_dir, "up", model, "--port", "0", fake=True) as run:
            run.ends_with(1)

        assert "group-0 was started 3 times and never got ready" in run.text
        assert "ended with code 9" in run.text

    def test_port_in_use_is_said_before_anything_is_loaded(self, run_dir, model):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with Run(run_dir, "up", model, "--port", str(port), fake=True) as run:
                run.ends_with(2)

        assert f"Port {port} on 127.0.0.1 is in use" in run.text
        assert "loading" not in run.text

    def test_two_at_once(self, run_dir, model, up):
        with Run(run_dir, "up", model, "--port", "0", fake=True) as second:
            second.ends_with(2)

        assert f"process {up.process.pid}, model mill, page {up.value('chat page')}" in second.text
        assert "HEADRACE_RUNTIME_DIR" in second.text

    def test_broker_that_runs_alone(self, run_dir, model):
        with Run(run_dir, "broker") as broker:
            broker.wait_for("broker ready")
            with Run(run_dir, "up", model, "--port", "0", fake=True) as run:
                run.ends_with(2)

        assert f"in use by the broker with process id {broker.process.pid}" in run.text

    def test_open_address_without_a_key(self, run_dir, model):
        with Run(run_dir, "up", model, "--host", "0.0.0.0", "--port", "0", fake=True) as run:
            run.ends_with(2)

        assert "--api-key" in run.text

    def test_runtime_folder_that_cannot_be_made(self, run_dir, model):
        (run_dir / "file").write_text("")
        with Run(run_dir / "file" / "below", "up", model, "--port", "0", fake=True) as run:
            run.ends_with(2)

        assert "HEADRACE_RUNTIME_DIR" in run.text


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_signal_ends_an_idle_pool_well(self, up, number):
        up.send(number)

        up.ends_with(0)
        assert "Stopping" in up.text
        assert "Traceback" not in up.text

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
    def test_signal_of_a_terminal_reaches_all_processes(self, run_dir, model, number):
        """Ctrl-C and a closed window go to the whole group of processes, and only the parent may act on them.

        Bug of the first draft: the workers died of a closed window at once, with the answers that they had in work.
        """
        with Run(run_dir, "up", model, "--port", "0", fake=True, start_new_session=True) as run:
            run.value("try")
            with Client(f"ipc://{run_dir}/clients.sock") as client, client.stream("a", max_tokens=300) as stream:
                next(stream)
                os.killpg(run.process.pid, number)
                assert stream.result().usage.completion_tokens == 300
            run.ends_with(0)

        assert "again" not in run.text.replace("Ctrl-C", "")
        assert "lost" not in run.text

    def test_answers_in_work_are_finished(self, run_dir, tmp_path):
        """Bug of the first draft: groups and gateway drained at once, and a request between the two was lost."""
        model = fake_model(tmp_path / "mill", step_delay=0.02)
        with Run(run_dir, "up", model, "--port", "0", fake=True) as run:
            api = run.value("API")
            answers = []
            body = {"model": "mill", "prompt": "a", "max_tokens": 100}
            thread = threading.Thread(target=lambda: answers.append(fetch(f"{api}/completions", body=body)))
            with Client(f"ipc://{run_dir}/clients.sock") as client:
                stream = client.stream("a", max_tokens=100)
                thread.start()
                wait_until(lambda: client.status()["counters"]["requests_total"] == 2, "both run")
                next(stream)
                run.send(signal.SIGTERM)
                assert stream.result().usage.completion_tokens == 100
            thread.join(60)
            run.ends_with(0)

        [(status, answer)] = answers
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 100

    def test_second_signal_does_not_wait(self, run_dir, tmp_path):
        model = fake_model(tmp_path / "mill", step_delay=0.1)
        with Run(run_dir, "up", model, "--no-gateway", fake=True) as run:
            run.value("Python")
            with Client(f"ipc://{run_dir}/clients.sock") as client, client.stream("a", max_tokens=4000) as stream:
                next(stream)
                run.send(signal.SIGINT)
                run.wait_for("Stopping")
                run.send(signal.SIGINT)
                run.ends_with(130)

    def test_time_to_finish_is_limited(self, run_dir, tmp_path):
        model = fake_model(tmp_path / "mill", step_delay=0.1)
        arguments = ("--no-gateway", "--shutdown-timeout", "0.5")
        with Run(run_dir, "up", model, *arguments, fake=True) as run:
            run.value("Python")
            with Client(f"ipc://{run_dir}/clients.sock") as client, client.stream("a", max_tokens=4000) as stream:
                next(stream)
                run.send(signal.SIGTERM)
                run.ends_with(0)

    def test_signal_while_the_prompt_is_answered(self, run_dir, tmp_path):
        """Who presses Ctrl-C is who reads: nothing is worth waiting for."""
        model = fake_model(tmp_path / "mill", step_delay=0.1)
        arguments = ("--no-gateway", "--prompt", "a", "--max-tokens", "4000")
        with Run(run_dir, "up", model, *arguments, fake=True) as run:
            wait_until(lambda: status(run_dir)["counters"]["tokens_total"] > 3, "an answer is on its way")
            run.send(signal.SIGINT)
            run.ends_with(0)

    def test_signal_while_loading(self, run_dir, model):
        with Run(run_dir, "up", model, "--port", "0", fake=True) as run:
            run.wait_for("starting workers")
            run.send(signal.SIGINT)
            run.ends_with(130)

    def test_sigkill_leaves_no_orphans(self, up):
        family = up.family()
        assert len(family) >= 4

        up.send(signal.SIGKILL)

        up.ends_with(-signal.SIGKILL)
        wait_until(lambda: gone(family), "children die with their parent")


class TestDeaths:
    def test_broker_and_gateway_are_started_again_where_they_were(self, run_dir, up):
        page = up.value("chat page")
        with Client(f"ipc://{run_dir}/clients.sock") as client:
            for name in ("broker", "gateway"):
                up.child(f"headrace-{name}").kill()
                up.wait_for(f"The {name} was ended by SIGKILL")
                up.wait_for(f"The {name} is back")
                wait_until(lambda: client.models(), "the group is back at the broker")
                assert client.generate("a", max_tokens=5).usage.completion_tokens == 5
        wait_until(lambda: fetch(f"{page}ready")[0] == 200, "the page is where it was")

    def test_group_is_started_again(self, run_dir, up):
        rank = up.child("group-0/0")
        with Client(f"ipc://{run_dir}/clients.sock") as client:
            rank.kill()
            up.wait_for("group-0: lost rank 0")
            up.wait_for("group-0: ready")
            assert client.generate("a", max_tokens=5).usage.completion_tokens == 5

    def test_stdout_whose_reader_goes(self, run_dir, model):
        """Bug of the first draft: a closed pipe ended the pool at its next line."""
        read, write = os.pipe()
        with Run(run_dir, "up", model, "--no-gateway", "--prompt", "a", fake=True, stdout=write) as run:
            os.close(write)
            os.close(read)
            wait_until(lambda: status(run_dir)["counters"]["finished_total"], "it serves all the same")
            assert run.process.poll() is None
            run.send(signal.SIGTERM)
            run.ends_with(0)

    def test_closed_stdout(self, run_dir, model):
        arguments = ("--no-gateway", "--prompt", "a", "--max-tokens", "5", "--once")
        with Run(run_dir, "up", model, *arguments, fake=True, stdout=None, preexec_fn=lambda: os.close(1)) as run:
            run.ends_with(0)

        assert "5 tokens" in run.text


def status(run_dir):
    """The report of a broker that may not run yet."""
    with Client(f"ipc://{run_dir}/clients.sock") as client:
        return client.status()

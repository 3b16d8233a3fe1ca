"""`headrace chat`: conversations through a pipe, in a terminal, and what each command does."""

import os
import signal

import pytest
from click.testing import CliRunner

from headrace.errors import ContextLengthError
from headrace.messages import unpack_tokens
from headrace.scripts.chat import Conversation
from headrace.scripts.main import cli
from headrace.scripts.terminal import Terminal
from tests.client.pool import speaking, wait_until
from tests.client.tiny import tiny_card
from tests.scripts.commands import Pty


def asked(group):
    """The prompts that a group was given, as text."""
    return [bytes(t for t in unpack_tokens(a.prompt) if t < 256).decode(errors="replace") for a in group.assigned]


class TestPipe:
    def test_answers_and_nothing_else(self, pool):
        pool.start_group(speaking("So it is."))

        result = CliRunner().invoke(cli, ["chat"], input="yes or no?\n\nsure?\n")

        assert result.exit_code == 0
        assert result.stdout == "So it is.\nSo it is.\n"
        assert result.stderr == ""

    def test_history_goes_along(self, pool):
        group = pool.start_group(speaking("Yes."))

        CliRunner().invoke(cli, ["chat", "--system", "Be brief."], input="abc\nxyz\n")

        first, second = asked(group)
        assert "Be brief." in first
        assert "xyz" not in first
        assert "Be brief." in second
        assert second.index("abc") < second.index("Yes.") < second.index("xyz")

    def test_settings_are_those_of_the_request(self, pool):
        group = pool.start_group(speaking("abc" * 100))

        result = CliRunner().invoke(
            cli, ["chat", "--max-tokens", "3", "--temperature", "0", "--seed", "5", "--top-p", "0.5"], input="mm\n"
        )

        assert result.stdout == "abc\n"
        sampling = group.assigned[0].sampling
        assert (sampling["max_tokens"], sampling["temperature"], sampling["seed"], sampling["top_p"]) == (3, 0, 5, 0.5)

    def test_unknown_model(self, pool):
        pool.start_group()

        result = CliRunner().invoke(cli, ["chat", "--model", "wheel"], input="a\n")

        assert result.exit_code == 2
        assert "wheel" in result.stderr

    def test_no_broker(self, run_dir, monkeypatch):
        monkeypatch.setenv("HEADRACE_ENDPOINT", f"ipc://{run_dir}/nobody.sock")

        result = CliRunner().invoke(cli, ["chat"], input="a\n")

        assert result.exit_code == 1
        assert "headrace up" in result.stderr

    def test_last_line_may_end_without_a_newline(self, pool):
        group = pool.start_group(speaking("Yes."))

        result = CliRunner().invoke(cli, ["chat"], input="abc \\\nxyz")

        assert result.stdout == "Yes.\n"
        assert "abc \nxyz" in asked(group)[0]


@pytest.fixture
def talk(pool, monkeypatch, capsys):
    """Plays lines in a chat as a person types them; gives what was written beside the answers."""
    pool.start_group(speaking("Yes."), card=tiny_card("mill"))

    def play(*lines, **settings):
        from headrace.client import Client

        left = list(lines)

        def read(prompt):
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        with Client(pool.endpoint) as client:
            conversation = Conversation(client, Terminal(), interactive=True, **settings)
            conversation.greet()
            conversation.run()
        return conversation, capsys.readouterr()

    return play


class TestCommands:
    def test_figures_follow_an_answer(self, talk):
        conversation, written = talk("abc")

        assert written.out.startswith("Yes.\n")
        assert "mill, context" in written.err
        assert "5 tokens, " in written.err
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"]

    def test_help(self, talk):
        _, written = talk("/help")

        for name in ("/new", "/retry", "/system", "/set", "/model", "/quit"):
            assert f"\n{name} " in "\n" + written.err

    def test_quit_ends_at_once(self, talk):
        conversation, _ = talk("/quit", "abc")

        assert conversation.messages == []

    def test_new_forgets(self, talk):
        conversation, written = talk("abc", "/new", "/retry")

        assert conversation.messages == []
        assert "no message to answer" in written.err

    def test_retry_answers_again(self, talk, pool):
        conversation, _ = talk("abc", "/retry")

        assert [message["content"] for message in conversation.messages] == ["abc", "Yes."]
        assert len(pool.groups[0].assigned) == 2

    def test_system_begins_anew(self, talk, pool):
        conversation, _ = talk("abc", "/system Be brief.", "xyz")

        assert [message["content"] for message in conversation.messages] == ["xyz", "Yes."]
        assert "Be brief." in asked(pool.groups[0])[1]

    def test_set(self, talk):
        conversation, written = talk("/set temperature 0.5", "/set seed 7", "/set temperature")
        assert conversation.settings == {"seed": 7}
        assert "temperature 0.5, seed 7" in written.err

        conversation, written = talk("/set temperature hot", "/set warmth 1", "/set temperature -1")
        assert conversation.settings == {}
        assert "temperature is 'hot'" in written.err
        assert "'warmth' is no setting" in written.err
        assert "temperature is -1" in written.err

    def test_model(self, talk, pool):
        pool.start_group(speaking("No."), card=tiny_card("wheel"))

        conversation, written = talk("/model", "/model wheel", "abc", "/model sail", model="mill")

        assert conversation.model == "wheel"
        assert "* mill\n  wheel\n" in written.err
        assert "  mill\n* wheel\n" in written.err
        assert written.out.startswith("No.\n")
        assert "sail" in written.err

    def test_unknown_command(self, talk):
        assert "/halp is no command" in talk("/halp")[1].err

    def test_error_leaves_the_conversation_as_it_was(self, talk):
        conversation, written = talk("abc", "x" * 5000, "abc")

        assert [message["content"] for message in conversation.messages] == ["abc", "Yes.", "abc", "Yes."]
        assert "/new begins a new conversation" in written.err

    def test_ctrl_c_at_the_prompt_is_no_end(self, talk):
        conversation, written = talk(KeyboardInterrupt(), "abc")

        assert len(conversation.messages) == 2
        assert "Ctrl-D or /quit" in written.err

    def test_error_from_a_pipe_ends_the_chat(self, pool, monkeypatch):
        pool.start_group(speaking("Yes."))

        result = CliRunner().invoke(cli, ["chat"], input="x" * 5000 + "\nabc\n")

        assert result.exit_code == 2
        assert ContextLengthError.__name__ not in result.stderr
        assert "tokens" in result.stderr


class TestTerminal:
    def test_a_conversation(self, pool, run_dir):
        pool.start_group(speaking("So it is."), step_delay=0.01)
        with Pty(run_dir, "chat") as chat:
            chat.wait_for(">>> ")
            chat.type("yes or no?\n")
            chat.wait_for("So it is.")
            assert "tokens, " in chat.wait_for("first token")
            chat.wait_for(">>> ")
            chat.type("\x04")
            assert chat.ended() == 0

    def test_ctrl_c_stops_the_answer_and_not_the_chat(self, pool, run_dir):
        group = pool.start_group(speaking("la " * 1000), step_delay=0.01)
        with Pty(run_dir, "chat") as chat:
            chat.wait_for(">>> ")
            chat.type("sing\n")
            chat.wait_for("la la la")
            os.kill(chat.process.pid, signal.SIGINT)
            assert "stopped" in chat.wait_for(">>> ")
            wait_until(lambda: not group.running)
            chat.type("/quit\n")
            assert chat.ended() == 0

    def test_answers_cannot_move_the_cursor(self, pool, run_dir):
        """A model may write anything, and a terminal obeys what it reads."""
        pool.start_group(speaking("red\x1b[31m\x07\x9b1mblue"))
        with Pty(run_dir, "chat", NO_COLOR="1") as chat:
            chat.wait_for(">>> ")
            chat.type("a\n")
            answer = chat.wait_for("blue")
            assert "red" in answer
            assert "\x1b[31m" not in answer
            assert "\x07" not in answer.split("red")[1]
            chat.wait_for(">>> ")

    def test_no_colour_where_none_is_wanted(self, pool, run_dir):
        pool.start_group(speaking("So it is."))
        for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
            with Pty(run_dir, "chat", **env) as chat:
                chat.wait_for(">>> ")
                chat.type("a\n")
                chat.wait_for("So it is.")
                assert ("\x1b[2m" in chat.wait_for("first token")) is coloured

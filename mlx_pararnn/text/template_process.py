"""Renders chat templates for chat_template.py, which starts this file as a process of its own.

A template is a program: one line of it can ask for more memory or time than there is, inside of a single step
that nothing in the same process could interrupt. Here the system's limits end it, and only this process.

Arguments: the descriptor of a socket, bytes of memory, seconds for one template, and the folders that hold
Jinja. Requests and answers are JSON.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any

KEPT = 4  # compiled templates


def main() -> None:
    """Answer requests until there are no more."""
    descriptor, memory, seconds = map(int, sys.argv[1:4])
    sys.path += sys.argv[4:]
    environment = _environment()
    for limit, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # the user's own limit is lower
            resource.setrlimit(limit, (most, most))
    parent = os.getppid()

    def look(number: int, frame: object) -> None:
        if os.getppid() != parent:  # killed, or left by a second Ctrl-C: nobody waits for the text
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    compiled: dict[str, Any] = {}
    socket = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        socket.send_bytes(b"ready")
        while True:
            request = socket.recv_bytes()
            _limit_time(seconds)
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
            answer = _answer(environment.from_string, compiled, json.loads(request))
            signal.setitimer(signal.ITIMER_REAL, 0)
            socket.send_bytes(json.dumps(answer).encode())


def _answer(
    compile_template: Callable[[str], Any], compiled: dict[str, Any], request: dict[str, Any]
) -> dict[str, str]:
    template = request["template"]
    try:
        if template not in compiled:
            if len(compiled) == KEPT:
                compiled.clear()
            compiled[template] = compile_template(template)
        text = compiled[template].render(**request["names"])
        return {"text": text} if len(text) <= request["longest"] else {"exceeded": "text"}
    except MemoryError:
        return {"exceeded": "memory"}
    except Exception as error:  # it raises what it likes
        return {"error": str(error) or type(error).__name__}


def _limit_time(seconds: int) -> None:
    """Of a processor, for one template; then the system ends this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + seconds + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _environment() -> Any:
    """Jinja as transformers' documentation describes it to the authors of templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %}, which marks what the model says; here it is text as any other."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            """Its body, in a scope of its own."""
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    class PlainNamespace(Namespace):
        """A namespace without names that begin with _."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute `self`
            names = dict(*args[1:], **kwargs)
            for name in names:
                check(name)
            Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name that begins with _, as {name!r} does")

    class Dictionaries:
        """dict(...) and dict.fromkeys(...), and nothing else of the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """Without the escapes that Jinja's own puts in for HTML."""
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dictionaries(),
        "namespace": PlainNamespace,
    }
    return environment


if __name__ == "__main__":
    main()

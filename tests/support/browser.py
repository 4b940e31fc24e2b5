"""A headless Chromium, driven over its DevTools protocol through a pipe: no package needed."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "KeyZ": 90, "KeyR": 82}
# of the chat page
IDLE = "document.getElementById('send')?.disabled === false"
ANSWER = "conversation.filter((m) => m.role === 'assistant').at(-1)?.content"
VIOLATIONS = "axe.run().then((found) => found.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))"


def find_chromium():
    return next(filter(None, map(shutil.which, NAMES)), MAC if os.path.exists(MAC) else None)


class Browser:
    """One page. `requests`: the addresses it asked for and what it sent; `errors`: what went wrong in it."""

    def __init__(self, credentials=None):
        self.credentials = credentials
        self.requests, self.errors, self._count, self._buffer = [], [], 0, b""
        self._profile = tempfile.mkdtemp()
        (their_in, self._out), (self._in, their_out) = os.pipe(), os.pipe()
        their_in, their_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (their_in, their_out))
        quiet = os.open(os.devnull, os.O_RDWR)
        arguments = [
            *(find_chromium(), "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={self._profile}", "about:blank"),
        ]
        actions = [(os.POSIX_SPAWN_DUP2, quiet, n) for n in (0, 1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, their_in, 3), (os.POSIX_SPAWN_DUP2, their_out, 4)]
        self.pid = os.posix_spawn(arguments[0], arguments, os.environ, file_actions=actions, setpgroup=0)
        for fd in (their_in, their_out, quiet):
            os.close(fd)
        self._session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        if credentials:
            self.send("Fetch.enable", handleAuthRequests=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method, **params):
        """Call a method of the protocol and wait for its result."""
        number = self._post(method, params)
        deadline = time.monotonic() + 60
        while True:
            message = self._receive(deadline)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message.get("method"), message.get("params"))

    def _post(self, method, params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        return self._count

    def _receive(self, deadline):
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0], "no answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has left"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, method, params):
        if method == "Network.requestWillBeSent":
            self.requests.append((params["request"]["url"], params["request"].get("postData")))
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Fetch.requestPaused":
            self._post("Fetch.continueRequest", {"requestId": params["requestId"]})
        elif method == "Fetch.authRequired":
            user, password = self.credentials
            response = {"response": "ProvideCredentials", "username": user, "password": password}
            self._post(
                "Fetch.continueWithAuth",
                {"requestId": params["requestId"], "authChallengeResponse": response},
            )

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script, seconds=60):
        """Until the expression is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, (script, self.run("document.body.innerText"), self.errors)
            time.sleep(0.05)
        return value

    def type(self, text):
        self.send("Input.insertText", text=text)

    def press(self, code, alt=False):
        key = code.removeprefix("Key").lower() if code.startswith("Key") else code
        same = {"code": code, "key": key, "windowsVirtualKeyCode": KEYS[code], "modifiers": 1 if alt else 0}
        text = {"text": "\r"} if code == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **same, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **same)

    def click(self, name):
        """With the mouse, in the middle of the element of that id."""
        place = self.run(
            f"(() => {{ const r = document.getElementById({name!r}).getBoundingClientRect();"
            "return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def show_as(self, width, height, dark=False, phone=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self):
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])


def set_field(page, name, value):
    page.run(f"document.getElementById({name!r}).value = {json.dumps(value)}")

"""A headless Chromium, found or installed, and driven over the DevTools protocol.

The protocol runs over a pipe, so there is no port to find and the browser ends when the pipe is closed, come what may.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import platform
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

WEB = Path(__file__).parents[1] / "examples" / "web"
CACHE = Path(
    os.environ.get("DGEMMA_TESTS_CACHE")  # of the run that this one is a worker of; see conftest.py
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgemma-tests"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chromium-headless-shell")
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = (
    "--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-extensions",
    "--disable-sync", "--hide-scrollbars", "--mute-audio", "--password-store=basic", "--use-mock-keychain",
    "--no-sandbox", "--no-zygote",  # a sandbox cannot be had in most containers, and the only page shown is our own
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
# Puts the protocol's pipe where Chromium looks for it: it reads commands from 3 and answers on 4.
TRAMPOLINE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
UNPACK = """
const zlib = require("zlib"), fs = require("fs"), [from, to] = process.argv.slice(1);
fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(from)));
"""
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}/fonts</dir><cachedir>{folder}/cache</cachedir></fontconfig>
"""


def installed() -> str | None:
    """Return the path of a Chromium or Chrome of this machine."""
    return next((path for name in (*NAMES, MACOS) if (path := shutil.which(name))), None)


def find(scratch: Path) -> str:
    """Return a Chromium's executable; from npm, if the machine has none. Skips where there is none for it.

    Args:
        scratch: an empty folder.
    """
    if found := installed():
        return found
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("no Chromium or Chrome here, and npm has one for x86-64 Linux only: install one")
    version = json.loads((WEB / "package.json").read_text())["devDependencies"]["@sparticuz/chromium"]
    folder = CACHE / f"chromium-{version}"
    if not folder.is_dir():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(WEB / name, scratch)
        building = runpy.run_path(str(WEB / "build.py"))
        building["install"](scratch)
        unpack(scratch / "node_modules" / "@sparticuz" / "chromium", building["tools"]()[0], folder)
        shutil.rmtree(scratch)
    return str(folder / "chromium")


def unpack(package: Path, node: str, folder: Path) -> None:
    """Unpack npm's `@sparticuz/chromium` (Linux, x86-64), which needs no library but glibc, into a new folder."""
    fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
    fresh.mkdir(parents=True)
    for name in ("chromium", "al2023.tar", "fonts.tar"):
        subprocess.run([node, "-e", UNPACK, package / "bin" / f"{name}.br", fresh / name], check=True)
        if name.endswith(".tar"):
            subprocess.run(["tar", "-xf", fresh / name, "-C", fresh], check=True)
            (fresh / name).unlink()
    (fresh / "fonts.conf").write_text(FONTS.format(folder=folder))  # it ends itself where there is no font at all
    (fresh / "chromium").chmod(0o755)
    settle(fresh, folder)


def settle(fresh: Path, folder: Path) -> None:
    """Give a new folder its name, unless another worker of the tests was first."""
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(fresh)


class Chromium:
    """One browser with one page.

    Args:
        path: the executable.
        profile: an empty folder.
    """

    def __init__(self, path: str, profile: Path) -> None:
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read, write)]  # away from 3 and 4
        environment = dict(os.environ)
        folder = Path(path).parent
        if (folder / "fonts.conf").is_file():  # unpacked from npm, with what it needs
            environment |= {"LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_PATH": str(folder)}
        command = [sys.executable, "-c", TRAMPOLINE, *map(str, ends), path, *FLAGS, f"--user-data-dir={profile}"]
        self._errors = (profile / "stderr").open("w+b")
        self._process = subprocess.Popen(
            command, pass_fds=ends, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        for fd in (read, write, *ends):
            os.close(fd)
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._next = 0
        self._session: str | None = None
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser: by asking, by closing the pipe, by force."""
        with contextlib.suppress(OSError):
            os.write(self._to, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        os.close(self._to)
        os.close(self._from)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):  # whatever of it is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def call(self, method: str, *, timeout: float = 60, **params: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are kept in `events`."""
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages(timeout):
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)
        raise TimeoutError(f"{method}: no answer in {timeout} s")

    def evaluate(self, expression: str) -> Any:
        """Run JavaScript in the page, wait for it if it is a promise, and return its value."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 60) -> Any:
        """Return the value of JavaScript once it is true."""
        deadline = time.monotonic() + timeout
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true in {timeout} s: {expression}\n{self.said()}")
            time.sleep(0.02)
        return value

    def press(self, keys: Sequence[str]) -> None:
        """Press keys: characters, or names such as `ArrowLeft`."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            code = {
                "Enter": 13,
                "Backspace": 8,
                "Tab": 9,
                "ArrowLeft": 37,
                "ArrowUp": 38,
                "ArrowRight": 39,
                "ArrowDown": 40,
            }
            extra = {"windowsVirtualKeyCode": code[key]} if key in code else {}
            if key == "Enter":
                text = {"text": "\r"}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **extra)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **extra)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def requests(self) -> list[str]:
        """Return the address of every request of the page so far, failed ones included; not those of workers."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def said(self) -> list[str]:
        """Return what the page has complained of: exceptions, warnings, errors."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))
            elif event["method"] == "Log.entryAdded":
                found.append(params["entry"]["text"])
        return found

    def _messages(self, timeout: float) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            while b"\0" in self._buffer:
                one, _, self._buffer = self._buffer.partition(b"\0")
                yield json.loads(one)
            if not select.select([self._from], [], [], left)[0]:
                return
            read = os.read(self._from, 1 << 16)
            if not read:
                self._errors.seek(0)
                raise RuntimeError(f"Chromium has ended: {self._errors.read().decode(errors='replace')[-2000:]}")
            self._buffer += read

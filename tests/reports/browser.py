"""A headless Chromium that opens a page from a file, driven over a pipe: nothing to install."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Browser:
    """Opens one page; everything that it reports or asks for is kept in `events`."""

    def __init__(self, folder: Path) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        above = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (commands, answers)]

        def place() -> None:  # where Chromium looks for its pipes
            os.dup2(above[0], 3)
            os.dup2(above[1], 4)

        flags = "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
        flags += " --disable-background-networking --disable-dev-shm-usage --hide-scrollbars"
        self.process = subprocess.Popen(
            [PROGRAM, *flags.split(), f"--user-data-dir={folder}"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in above:
            os.close(end)
        os.close(commands)
        os.close(answers)
        self._file = os.fdopen(self._in, "rb")
        self._number, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._file.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        answer = json.loads(text)
        if "id" not in answer:
            self.events.append(answer)
        return answer

    def open(self, page: Path, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        """Open a page of ours and wait until its charts are drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=page.absolute().as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done()"
                 " : addEventListener('load', done))")  # fmt: skip
        self.run("window.drawn")

    def run(self, code: str) -> Any:
        """Evaluate JavaScript, wait for its promise, and return its value."""
        options = {"expression": code, "awaitPromise": True, "returnByValue": True}
        found = self.send("Runtime.evaluate", **options)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window."""
        for moved in (x - 3, x):
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=moved, y=y)

    def picture(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the window, or of the whole page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def errors(self) -> list[str]:
        """List what the page has logged as an error or thrown."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"])[:500] for event in self.events
                if event["method"] in kinds]  # fmt: skip

    def asked_for(self) -> list[str]:
        """List the addresses that the page has asked for, besides its own and data it holds."""
        asked = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in asked[1:] if not address.startswith(("data:", "blob:"))]

    def close(self) -> None:
        """End the browser and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._file.close()
        os.close(self._out)

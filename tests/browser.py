"""One headless Chromium for tests of pages, driven over its debugging protocol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
_SECONDS = 60.0


class Browser:
    """A tab. Errors of its pages are collected in ``errors``."""

    def __init__(self, socket: WebSocketClientConnection, session: str) -> None:
        self.errors: list[str] = []
        self._socket, self._session, self._numbers = socket, session, itertools.count(100)

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.write_message(
            json.dumps({"id": number, "method": method, "params": params, "sessionId": self._session})
        )
        while True:
            said = json.loads(str(await asyncio.wait_for(self._socket.read_message(), _SECONDS)))
            is_error = said.get("method") == "Runtime.consoleAPICalled" and said["params"]["type"] == "error"
            if is_error or said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(said["params"]))
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]

    async def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        async with asyncio.timeout(_SECONDS):
            while not await self.value(expression):
                await asyncio.sleep(0.1)

    async def open(self, address: str, width: int = 960) -> None:
        """Open a page in a window of this width in pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
        )
        await self.call("Page.navigate", url=address)
        await self.until(f"document.readyState === 'complete' && location.href === {json.dumps(address)}")

    async def press(self, key: str, text: str = "") -> None:
        """Press a key."""
        codes = {"Tab": 9, "Enter": 13}
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "text": text}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **facts)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **facts)


@contextlib.asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Browser]:
    """Start a browser, and end it at the end of the block."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen([CHROMIUM, *options], stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            lines = (re.search(r"ws://\S+", line) for line in process.stderr)
            address = next(found[0] for found in lines if found)
            socket = await websocket_connect(address, max_message_size=64 << 20)
            browser_tab = Browser(socket, "")
            browser_tab._session = await _attached(socket)
            for domain in ("Page", "Runtime", "Log"):
                await browser_tab.call(f"{domain}.enable")
            yield browser_tab
            socket.close()
        finally:
            # All processes: Debian's command is a script that waits for the browser.
            os.killpg(process.pid, signal.SIGKILL)


async def _attached(socket: WebSocketClientConnection) -> str:
    """Return the session of a new tab."""
    target = {"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}
    await socket.write_message(json.dumps(target))
    made = await _answer(socket, 1)
    attach = {"targetId": made["targetId"], "flatten": True}
    await socket.write_message(json.dumps({"id": 2, "method": "Target.attachToTarget", "params": attach}))
    return str((await _answer(socket, 2))["sessionId"])


async def _answer(socket: WebSocketClientConnection, number: int) -> dict[str, Any]:
    while True:
        said = json.loads(str(await asyncio.wait_for(socket.read_message(), _SECONDS)))
        if said.get("id") == number:
            return said["result"]

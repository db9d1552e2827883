"""A real browser for tests: Chromium, without a window, spoken to over its DevTools pipe."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Browser:
    """One page of a Chromium in a process of its own. `requests` are the addresses that it asked for, `errors` what went wrong in it."""

    def __init__(self, program, folder):
        to_read, to_write = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&$THEIR_IN 4>&$THEIR_OUT', "-", program, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"], pass_fds=(to_read[0], to_write[1]),
            env={**os.environ, "THEIR_IN": str(to_read[0]), "THEIR_OUT": str(to_write[1])}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read[0]), os.close(to_write[1])
        self.to, self.come = os.fdopen(to_read[1], "wb"), os.fdopen(to_write[0], "rb")
        self.count, self.session, self.events, self.rest = 0, None, [], b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """Say a DevTools command and wait for its result."""
        self.count += 1
        message = dict(id=self.count, method=method, params=parameters, **({"sessionId": self.session} if self.session else {}))
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while (answer := self.hear()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def hear(self):
        while b"\0" not in self.rest:
            if not select.select([self.come], [], [], 60)[0]:
                raise TimeoutError("the browser has said nothing for a minute")
            part = os.read(self.come.fileno(), 1 << 20)
            if not part:
                raise ConnectionError("the browser has ended")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1200, height=900, phone=False, **features):
        """Load a file at a size of the window. features: of media, such as prefers_color_scheme="dark"."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self("Emulation.setEmulatedMedia", features=[dict(name=name.replace("_", "-"), value=value) for name, value in features.items()])
        self.events.clear()
        self("Page.navigate", url=path.resolve().as_uri())
        while self.js("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.02)

    def js(self, code):
        """The value of an expression in the page."""
        result = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def point(self, selector, kind="click"):
        """Move the mouse to the middle of an element, scrolled into sight, and press it there unless kind is "hover"."""
        x, y = self.js(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] }})"
                       f"(document.querySelector({json.dumps(selector)}))")
        for what in ["mouseMoved"] + ["mousePressed", "mouseReleased"] * (kind == "click"):
            self("Input.dispatchMouseEvent", type=what, x=x, y=y, button="none" if what == "mouseMoved" else "left", clickCount=1)

    def press(self, *keys):
        """Press keys, by the names of KeyboardEvent.key."""
        codes = dict(Enter=13, Escape=27, Tab=9, End=35, Home=36, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40, PageDown=34, PageUp=33)
        for key in keys:
            text = {"Enter": "\r", " ": " "}.get(key)
            for what in ("keyDown", "keyUp"):
                self("Input.dispatchKeyEvent", type=what, key=key, code=key, windowsVirtualKeyCode=codes.get(key, 0), **({"text": text} if text and what == "keyDown" else {}))

    def picture(self):
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=False)["data"])

    @property
    def requests(self):
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    @property
    def errors(self):
        return [e["params"] for e in self.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def close(self):
        self.to.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.come.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Browser; skips, with the reason, where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    try:
        browser = Browser(program, tmp_path_factory.mktemp("profile"))
    except OSError as error:                                               # no part of what is tested
        pytest.skip(f"{program} does not start: {error}")
    yield browser
    browser.close()

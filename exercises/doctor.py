"""Is this machine ready for the workshop?  python -m exercises doctor"""

import platform
import shutil
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def doctor():
    """Print one line a finding; returns 1 if something that the exercises need is missing."""
    good = True

    def say(state, text):
        nonlocal good
        good = good and state != "BAD"
        print(f"{state:<4}  {text}")

    say("ok" if sys.version_info >= (3, 10) else "BAD", f"Python {platform.python_version()} (3.10 or later is needed)")
    free = shutil.disk_usage(ROOT).free / 1e9
    say("ok" if free > 1 else "note", f"{free:.1f} GB of disk are free (1 GB is plenty; the real 270M weights take 1 GB more)")
    try:
        socket.create_connection(("pypi.org", 443), timeout=3).close()
        say("ok", "the network is there (no exercise needs it)")
    except OSError:
        say("note", "no network: fine for all exercises; packages have to come from elsewhere, see exercises/TEACHING.md")
    try:
        import torch
    except ImportError:
        say("BAD", "PyTorch is missing: pip install torch")
        return 1
    say("ok", f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    try:
        from gemma import InputError
        from memory import GemmaWithMemory
    except ImportError as error:
        say("note", f"{error.name} is missing: every check works, --use-mine does not")
        return 0 if good else 1
    ids = torch.tensor([[2, 200, 300, 400, 500]])
    try:
        cpu = GemmaWithMemory.from_pretrained("tiny").gemma(ids)
        say("ok", "the tiny model runs on the CPU")
        devices = [d for d, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there]
        for device in devices:
            there = GemmaWithMemory.from_pretrained("tiny", dtype=torch.float32, device=device).gemma(ids.to(device)).cpu()
            apart = (there - cpu).abs().max().item()
            say("ok" if apart < 1e-2 else "note", f"{device}: logits are at most {apart:.1e} from the CPU's")
        if not devices:
            say("ok", "no GPU: none is needed")
    except (InputError, RuntimeError) as error:
        say("BAD", f"the tiny model does not run: {' '.join(str(error).split())}")
    return 0 if good else 1

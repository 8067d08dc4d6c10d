"""Talk to a model in the browser, or from programs that speak the OpenAI API.

python -m scripts.chat_web                                   the newest fine-tuned model, on http://127.0.0.1:8000
python -m scripts.chat_web -i base --port=9000
NANOCHAT_API_KEY=... python -m scripts.chat_web --host=0.0.0.0
"""

from typing import Annotated

from nanochat import cli
from nanochat.cli import alias, float_flag, int_flag
from nanochat.flags import DeviceFlags, ModelFlags, Stage


@cli.program
class Settings(ModelFlags, DeviceFlags):
    """Serve trained models over HTTP. NANOCHAT_API_KEY, where it is set, is what clients must send."""

    stage: Annotated[Stage, alias("-i")] = "sft"
    """Training stage of the model that answers where a request names none; the others are there by their names."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: everybody who reaches this machine may use it."""
    port: Annotated[int, int_flag(gte=0, lte=65535), alias("-p")] = 8000
    """Port to listen on; 0: a free one."""
    rows: Annotated[int, int_flag(gte=1)] = 32
    """Answers that are written at the same time, on each device."""
    queue: Annotated[int, int_flag(gte=0)] = 256
    """Answers that may wait for their turn, on each device; more are told to come back."""
    deadline: Annotated[float, float_flag(gte=1)] = 300.0
    """Seconds that an answer may take."""


import os
import socket

import torch
import uvicorn

from nanochat.errors import UserError
from nanochat.runtime import compute_cleanup, compute_init
from nanochat.serve.models import Models
from nanochat.serve.server import ServerSettings, create_app


def main(settings: Settings) -> None:
    device = compute_init(settings.device_type)[-1]
    devices = [device]
    if device.type == "cuda":  # a copy of the model on each card
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    listener = _listen(settings.host, settings.port)
    models = Models(devices, settings.rows, settings.queue)
    served = models.add(settings.stage, settings.model_tag, settings.model_step)
    api_key = os.environ.get("NANOCHAT_API_KEY") or None
    app = create_app(models, ServerSettings(deadline=settings.deadline, api_key=api_key))
    host, port = listener.getsockname()[:2]
    print(f"{served.name} answers on http://{host}:{port} (Ctrl-C ends)", flush=True)
    # a stop lets streams that are going on end
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(settings.deadline))
    uvicorn.Server(config).run(sockets=[listener])
    compute_cleanup()


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: a port that is taken is said at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from None


if __name__ == "__main__":
    cli.run(main, Settings)

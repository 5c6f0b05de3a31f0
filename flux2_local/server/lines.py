"""What ``serve`` prints: where it listens, and lines to paste for each client."""

from __future__ import annotations

from ..endpoints import endpoints
from ..presets import variants
from .gate import PROXY_PATH
from .settings import Settings
from .tls import Certificates


def greeting(settings: Settings, certificates: Certificates | None) -> str:
    """The server's first words."""
    host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host
    at = f"{f'[{host}]' if ':' in host else host}:{settings.port}"
    key = "YOUR_KEY" if settings.key else "any"
    standard = variants()["standard"].endpoint
    lines = [
        f"flux2-local is listening on http://{at} (a page to try it; Ctrl-C stops it)",
        f"endpoints: {', '.join(endpoints())}",
        "",
        "cURL:",
        f"  curl http://{at}/{standard} -H 'Authorization: Key {key}' -H 'Content-Type: application/json' \\",
        """    --data '{"prompt": "a lighthouse at dusk"}'""",
        "",
        "Python, before the first call of fal_client:",
        f"  import os; os.environ['FAL_KEY'] = '{key}'",
        "  import fal_client.client as fal",
        f"  fal.RUN_URL_FORMAT, fal.QUEUE_URL_FORMAT = 'http://{at}/', 'http://{at}/queue/'",
        f"  fal.REST_URL = fal.CDN_URL = 'http://{at}'  # uploads",
        "",
        *_tls_lines(settings, certificates, host, key),
        "JavaScript, before the first call of fal:",
        f'  fal.config({{ {_credentials(settings)}proxyUrl: {{ url: "http://{at}{PROXY_PATH}", when: "always" }} }});',
    ]
    return "\n".join(lines)


def _tls_lines(settings: Settings, certificates: Certificates | None, host: str, key: str) -> list[str]:
    if certificates is None:
        return ["Python with environment variables alone: run with --tls", ""]
    at = f"{f'[{host}]' if ':' in host else host}:{settings.tls_port}"
    return [
        "Python, the script as it is:",
        f"  export FAL_KEY={key} FAL_RUN_HOST={at} FAL_QUEUE_RUN_HOST={at}/queue",
        f"  export SSL_CERT_FILE={certificates.bundle}",
        "",
    ]


def _credentials(settings: Settings) -> str:
    return 'credentials: "YOUR_KEY", ' if settings.key else ""

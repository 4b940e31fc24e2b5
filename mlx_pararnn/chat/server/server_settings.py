"""What a server is told when it starts."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Where a server listens, for whom, and how much it gives.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        api_key: what every request must carry; a must where the host is not this machine alone.
        allowed_origins: of pages and desktop apps that may use the server (`app://obsidian.md`), and names
            under which it may be reached (`host.docker.internal`).
        max_tokens: the most that one answer may have.
        temperature, top_p, top_k, min_p, repetition_penalty: for requests that do not say; a model that uses
            tools takes no penalty.
        prompt_cache_bytes: for stored states.
        prompt_cache_folder: where they are saved too, to survive a restart; None for nowhere.
        functions: whether a model that uses tools may call the package's own functions, which run here.
        adapter_path: a folder of adapters for the model, or None.
        initial_state: a file of states that every conversation begins with; None for the model's own.
        examples: questions that the page offers before the first one is asked.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    prompt_cache_bytes: int = 2**30
    prompt_cache_folder: Path | None = None
    functions: bool = False
    adapter_path: Path | None = None
    initial_state: Path | None = None
    examples: tuple[str, ...] = ()

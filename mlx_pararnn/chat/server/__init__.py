"""`mlx-pararnn serve`: one model, with OpenAI's protocol, and a chat page.

`listen` takes connections, `access` turns away who may not ask, `app` has the paths, `schema` reads requests,
`prompts` makes tokens of them. `service` and `choices` bring what `engine`, the model's one thread, generates
into OpenAI's form, `responses` and `messages` into those of /v1/responses and of Anthropic. For the engine a
sequence is a job (`jobs`); `reading` reads its prompt, and in the `batch` it generates. Of several processes
rank 0 has all this, and the others make the batch's calls `together` with it.
"""

from .listen import serve
from .server_settings import Settings

__all__ = ["Settings", "serve"]

"""Which path of HTTP speaks which dialect."""

from __future__ import annotations

from dataclasses import dataclass

from llamacpp_mqtt_deploy.core.formats import anthropic, ollama, openai_chat, openai_responses, plain, seeds
from llamacpp_mqtt_deploy.core.formats.rendering import Dialect


@dataclass(frozen=True, slots=True)
class HttpRoute:
    """A path that is posted to. `streams` is None where the body says whether the answer streams."""

    path: str
    dialect: Dialect
    streams: bool | None = None


HTTP_ROUTES: tuple[HttpRoute, ...] = (
    HttpRoute("/v1/chat/completions", openai_chat.OPENAI_CHAT),
    HttpRoute("/v1/responses", openai_responses.OPENAI_RESPONSES),
    HttpRoute("/v1/messages", anthropic.ANTHROPIC),
    HttpRoute("/api/chat", ollama.OLLAMA_CHAT),
    HttpRoute("/api/generate", ollama.OLLAMA_GENERATE),
    HttpRoute("/api/llm/chat", seeds.LLM_CHAT, streams=False),
    HttpRoute("/api/llm/chat/stream", seeds.LLM_CHAT, streams=True),
    HttpRoute("/api/llm/chat/session", seeds.LLM_SESSION, streams=False),
    HttpRoute("/api/llm/chat/session/stream", seeds.LLM_SESSION, streams=True),
    HttpRoute("/api/chatbot/messages", seeds.CHATBOT, streams=False),
    HttpRoute("/api/chatbot/messages/stream", seeds.CHATBOT, streams=True),
    HttpRoute("/chat", seeds.PROMPT_CHAT),
    HttpRoute("/chat/", seeds.PROMPT_CHAT),
    HttpRoute("/chat/conversation", seeds.CONVERSATION),
    HttpRoute("/chat/stream", seeds.MESSAGE_STREAM, streams=True),
    HttpRoute("/api/chat/stream", seeds.MESSAGE_STREAM, streams=True),
    HttpRoute("/api/stream/message", seeds.TOKEN_STREAM, streams=True),
    HttpRoute("/api/stream/chatkit", seeds.TOKEN_STREAM, streams=True),
    HttpRoute("/ask", plain.ASK_TEXT),
    HttpRoute("/ask/events", plain.ASK_EVENTS),
)

"""LlamaIndex's client of OpenAI-like servers. argv: URL, model, question; prints what it got as one JSON
object.
"""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main() -> None:
    url, model, question = sys.argv[1:4]
    llm = OpenAILike(
        model=model, api_base=f"{url}/v1", api_key="none", is_chat_model=True, max_tokens=60, temperature=0,
        context_window=2048,
    )  # fmt: skip
    messages = [ChatMessage(role="user", content=question)]
    result = {
        "text": llm.chat(messages).message.content,
        "streamed": "".join(chunk.delta or "" for chunk in llm.stream_chat(messages)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

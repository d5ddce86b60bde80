"""LangChain's client of OpenAI's API. argv: URL, model, question; prints what it got as one JSON object."""

import json
import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def main() -> None:
    url, model, question = sys.argv[1:4]
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=60)
    called = chat.bind_tools([Person], tool_choice="Person").invoke("Ann is 31 years old.").tool_calls
    structured = chat.with_structured_output(Person, method="json_schema")
    result = {
        "text": chat.invoke(question).content,
        "streamed": "".join(str(chunk.content) for chunk in chat.stream(question)),
        "structured": structured.invoke("Ann is 31 years old.").model_dump(),
        "called": [{"name": call["name"], "args": call["args"]} for call in called],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

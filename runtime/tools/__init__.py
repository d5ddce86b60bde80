"""Tools that a model may call, and the loop that lets it.

`function.py`: a typed Python function is a tool. `registry.py`: `ToolBox`, tools by name, and how a call is
run. `calculate.py`: the built-in one. `mcp.py`: tools of MCP servers. `agent.py`: the loop. `trace.py`: its
record, and the replay of it.
"""

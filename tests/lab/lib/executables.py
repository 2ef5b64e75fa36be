"""Reads cargo's JSON messages, prints `NAME<tab>PATH` for each executable that they tell of."""

import json
import sys

for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] == "compiler-artifact" and message["executable"]:
        print(message["target"]["name"], message["executable"], sep="\t")

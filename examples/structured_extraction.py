"""Facts out of texts, as JSON of a schema; the same text and seed give the same facts, whatever is asked beside them.

    python examples/structured_extraction.py [MODEL]

Needs the extra `structured`.
"""

from __future__ import annotations

import json
import sys

from sempre import LLM, SamplingParams
from sempre.sampling_params import StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["person", "ship", "place"]},
        "year": {"type": "integer", "minimum": 1500, "maximum": 2000},
    },
    "required": ["name", "kind", "year"],
    "additionalProperties": False,
}
TEXTS = [
    "In 1851 the Pequod left Nantucket with captain Ahab on board.",
    "Elizabeth Bennet lived at Longbourn, a village in Hertfordshire, in 1813.",
]


def main() -> None:
    params = SamplingParams(
        temperature=0.7, seed=7, max_tokens=96, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )
    prompts = [f"{text}\nAs JSON: " for text in TEXTS]
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "tiny") as llm:
        together = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
        alone = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].text for prompt in prompts]
    for text in together:
        print(json.dumps(json.loads(text)))
    print("alone and together:", "equal" if alone == together else "different")


if __name__ == "__main__":
    main()

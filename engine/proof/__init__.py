"""Outputs that are kept, and shown to be equal: saved runs, receipts, and how they are compared and made again.

json_values.py     JSON of any output, and the canonical JSON of RFC 8785
json_lines.py      files of JSON lines, each judged alone
saved_outputs.py   save_outputs, load_outputs: one JSON line per output
frames.py          to_frame: outputs as a table of pandas
token_html.py      outputs as HTML, tokens coloured by probability
output_chain.py    the rolling digest of an output, with four bytes kept per position
statement.py       what a receipt says: an in-toto statement
dsse.py            envelopes and signatures
recorder.py        makes the receipt of an output, receipt_log.py their files
kept_output.py     an output in any of these forms; differences.py: where two of them first differ
run_comparison.py  two runs; report_html.py: their comparison for a browser
replay.py          receipts made again
verification.py    every axis of the guarantee, checked on this machine
traces.py          the results of every module, and the first that differs between two engines of any layout
bisection.py       the first token and operation that differ between two engines
"""

"""Outputs that are kept, and shown to be equal: saved runs, receipts, and how they are compared and made again.

saved_outputs.py  save_outputs, load_outputs: one JSON line per output
json_lines.py     files of JSON lines, each judged alone
frames.py         to_frame: outputs as a table of pandas
token_html.py     outputs as HTML, tokens coloured by probability
"""

"""Train a small decoder transformer on theria's attention: `python examples/minimal_decoder_transformer.py --help` lists the flags.

Model, tasks and training loop are in `theria.decoder`, explained on the page "A decoder that learns" (nbs/decoder.ipynb).
`theria train-decoder` takes the same flags.
"""
from theria.decoder import main

if __name__ == "__main__":
    main()

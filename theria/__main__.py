"`python -m theria` is the command `theria`."
from theria.cli import main

if __name__ == "__main__": main()

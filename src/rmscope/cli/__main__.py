from rmscope.cli import main

main()

from fasttune.cli import main

main()

"""The command ``sap-fast``: parse, call the library, print."""

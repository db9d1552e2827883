"""The workshop: exercises that check themselves. Start with  python -m exercises"""

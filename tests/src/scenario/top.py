"""Runs a command in a pseudo terminal of 80x24, says what is on its screen after some seconds, presses q.

Arguments: seconds, then the command. Prints JSON: {"screen": [lines], "coloured": bool, "status": exit status}.
"""

import fcntl, json, os, pty, re, select, signal, struct, sys, termios, time

ROWS, COLUMNS = 24, 80
# CSI sequences, other escapes, characters.
TOKEN = re.compile(r"\x1b\[([0-9;?]*)([@-~])|\x1b[()][A-Z0-9]|\x1b.|([\x00-\x1f])|([^\x00-\x1f\x1b])")


def screen_of(text):
    screen, row, column, coloured = [[" "] * COLUMNS for _ in range(ROWS)], 0, 0, False
    for parameters, final, control, character in TOKEN.findall(text):
        numbers = [int(n) if n.isdigit() else 0 for n in parameters.split(";")]
        if character:
            if column < COLUMNS:
                screen[row][column] = character
            column += 1
        elif control == "\r":
            column = 0
        elif control == "\n":
            row = min(row + 1, ROWS - 1)
        elif final in "Hf" and final:
            row = min(max(numbers[0], 1), ROWS) - 1
            column = max(numbers[1] if len(numbers) > 1 else 1, 1) - 1
        elif final == "G":
            column = max(numbers[0], 1) - 1
        elif final == "C":
            column += max(numbers[0], 1)
        elif final == "J":
            screen = [[" "] * COLUMNS for _ in range(ROWS)]
        elif final == "m":
            coloured |= any(30 <= n <= 38 or 40 <= n <= 48 or 90 <= n <= 107 for n in numbers)
    return ["".join(line).rstrip() for line in screen], coloured


def main():
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    child, terminal = pty.fork()
    if child == 0:
        # The parent sets the size; whoever draws asks for it again at each drawing.
        os.environ["TERM"] = "xterm-256color"
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    raw, begin, before, pressed = b"", time.monotonic(), None, False
    while True:
        readable, _, _ = select.select([terminal], [], [], 0.1)
        if readable:
            try:
                read = os.read(terminal, 65536)
            except OSError:
                break
            if not read:
                break
            raw += read
        passed = time.monotonic() - begin
        if passed > seconds and not pressed:
            before, pressed = raw, True
            os.write(terminal, b"q")
        if passed > seconds + 10:
            os.kill(child, signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)
    screen, coloured = screen_of((before or raw).decode(errors="replace"))
    print(json.dumps({"screen": screen, "coloured": coloured, "status": os.waitstatus_to_exitcode(status)}))


main()

package layout

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// once is a test that fails at its first run.
const once = `func TestOnce(t *testing.T) {
	if os.Mkdir("tried", 0o700) == nil {
		t.Fatal("the first time")
	}
}
`

// imports begins a file of tests.
const imports = "package some\n\nimport (\n\t\"os\"\n\t\"testing\"\n)\n\nvar _ = os.Args\n\n"

// fail is a test that always fails.
func fail(name string) string { return "func Test" + name + "(t *testing.T) { t.Fail() }\n" }

// TestSecondTry: scripts/gotest.sh runs a test again if it failed, says so, and excuses nothing else.
func TestSecondTry(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds twenty tests")
	}
	script, err := filepath.Abs("../../../scripts/gotest.sh")
	if err != nil {
		t.Fatal(err)
	}
	const passed, second = "passed only at the second try: m.example/", "second try: m.example/"
	for _, tt := range []struct {
		name, tests string
		passes      bool
		says        string
		never       string
	}{
		{"good", "func TestGood(t *testing.T) {}\n", true, "ok", "second try"},
		{"fails once", once, true, passed + "some TestOnce", ""},
		{"fails always", fail("Bad"), false, second + "some TestBad", passed},
		{"race", once + "func TestRace(t *testing.T) { println(\"WARNING: DATA RACE\") }\n", false, "RACE", "second try"},
		{"panic", "func TestPanic(t *testing.T) { os.Mkdir(\"tried\", 0o700); panic(1) }\n", false, "panic: 1", "second try"},
		{"no test named", "func TestMain(m *testing.M) { os.Exit(1) }\n", false, "FAIL\tm.example/some", "second try"},
		{"does not build", "func TestNo(t *testing.T) { no() }\n", false, "build failed", "second try"},
		{"three", fail("A") + fail("B") + once, false, "second try: m.example/some TestA TestB TestOnce", passed},
		{"four", fail("A") + fail("B") + fail("C") + fail("D"), false, "--- FAIL: TestD", "second try"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			writeFile(t, dir+"/go.mod", "module m.example\n\ngo 1.24\n")
			writeFile(t, dir+"/some/some_test.go", imports+tt.tests)
			writeFile(t, dir+"/good/good_test.go", imports+"func TestGood(t *testing.T) {}\n")
			cmd := exec.Command(script, "-vet=off", "-count=1", "--", "./good", "./some")
			cmd.Dir = dir
			b, err := cmd.CombinedOutput()
			got := string(b)
			if (err == nil) != tt.passes || !strings.Contains(got, tt.says) || tt.never != "" && strings.Contains(got, tt.never) {
				t.Errorf("%v\n%s", err, got)
			}
		})
	}
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

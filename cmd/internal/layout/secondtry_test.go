package layout

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	goodPackage = "ok  \tm.example/good\t0.010s\n"
	badPackage  = "FAIL\nFAIL\tm.example/some\t0.012s\n"
)

func failed(tests ...string) string {
	var b strings.Builder
	for _, name := range tests {
		b.WriteString("--- FAIL: " + name + " (0.00s)\n    some_test.go:15: why\n    --- FAIL: " + name + "/x (0.00s)\n")
	}
	return b.String()
}

// TestSecondTry: scripts/gotest.sh runs a failed test again, says so, and excuses nothing else.
func TestSecondTry(t *testing.T) {
	const passed, second = "passed only at the second try: m.example/some Test", "second try: m.example/some Test"
	for _, tt := range []struct {
		name, first, second string // what go test prints
		passes              bool
		says, never         string
	}{
		{"good", goodPackage, "", true, "ok", "second try"},
		{"fails once", goodPackage + failed("TestA") + badPackage, goodPackage, true, passed + "A\n", ""},
		{"fails always", failed("TestA") + badPackage, failed("TestA") + badPackage, false, second + "A\n", passed},
		{"race", failed("TestA") + "    WARNING: DATA RACE\n" + badPackage, goodPackage, false, "RACE", "second try"},
		{"panic", failed("TestA") + "panic: 1\n\ngoroutine 1\n" + badPackage, goodPackage, false, "panic: 1", "second try"},
		{"panic inside", failed("TestA") + "        panic: 1\n" + badPackage, goodPackage, false, "panic: 1", "second try"},
		{"no test named", goodPackage + badPackage + failed("TestA") + badPackage, goodPackage, false, "FAIL", "second try"},
		{"killed", failed("TestA") + "signal: killed\nFAIL\tm.example/some\t0.012s\n", goodPackage, false, "kill", "second try"},
		{"exits", failed("TestA") + "FAIL\tm.example/some\t0.012s\n", goodPackage, false, "FAIL", "second try"},
		{"passes when run twice", failed("TestA") + "FAIL\nPASS\nFAIL\tm.example/some\t0.012s\n", goodPackage, true, passed, ""},
		{"does not build", failed("TestA") + "FAIL\tm.example/some [build failed]\n", goodPackage, false, "build", "second try"},
		{"three", failed("TestA", "TestB", "TestC") + badPackage, goodPackage, true, second + "A TestB TestC\n", ""},
		{"four", failed("TestA", "TestB", "TestC", "TestD") + badPackage, goodPackage, false, "FAIL: TestD", "second try"},
		{"four of two packages", failed("TestA", "TestB") + badPackage + failed("TestC", "TestD") +
			strings.ReplaceAll(badPackage, "some", "other"), goodPackage, false, "FAIL: TestD", "second try"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeFile(t, dir+"/first", tt.first, 0o644)
			writeFile(t, dir+"/second", tt.second, 0o644)
			// It stands in for go test, and fails as that does.
			writeFile(t, dir+"/go", `#!/bin/sh
cat first; ! grep -q ^FAIL first; status=$?
mv second first; exit $status
`, 0o755)
			got, err := gotest(t, dir, dir+"/go")
			if (err == nil) != tt.passes || !strings.Contains(got, tt.says) || tt.never != "" && strings.Contains(got, tt.never) {
				t.Errorf("%v\n%s", err, got)
			}
		})
	}
}

// TestSecondTryOfGo: go test prints what scripts/gotest.sh expects.
func TestSecondTryOfGo(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/go.mod", "module m.example\n\ngo 1.24\n", 0o644)
	writeFile(t, dir+"/some/some_test.go", `package some

import (
	"os"
	"testing"
)

func TestOnce(t *testing.T) {
	if os.Mkdir("tried", 0o700) == nil {
		t.Run("inside", func(t *testing.T) { t.Error("the first time") })
	}
}
`, 0o644)
	const want = "passed only at the second try: m.example/some TestOnce\n"
	if got, err := gotest(t, dir, "go"); err != nil || !strings.Contains(got, want) {
		t.Errorf("%v\n%s", err, got)
	}
}

// gotest runs the script in a folder, with a program that is or stands in for go.
func gotest(t *testing.T, dir, program string) (string, error) {
	t.Helper()
	script, err := filepath.Abs("../../../scripts/gotest.sh")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(script, "-vet=off", "-count=1", "--", "./...")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GO="+program)
	b, err := cmd.CombinedOutput()
	return string(b), err
}

func writeFile(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

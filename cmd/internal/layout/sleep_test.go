package layout

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNoPlainSleep: a test waits for a condition, and says why where it must let time pass: by testkit.Pace, Settle,
// Never or Advance. A plain time.Sleep says nothing, is too short on a slow machine, and too long on all others.
func TestNoPlainSleep(t *testing.T) {
	const root = "../../.."
	seen := 0
	if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		seen++
		for _, at := range sleeps(t, path, b) {
			t.Errorf("%s: a plain time.Sleep in a test: wait for a condition by testkit.Eventually, or use Pace, Settle or Never",
				at)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if seen < 100 {
		t.Fatalf("only %d files of tests", seen)
	}
}

// sleeps lists where a file speaks of time.Sleep, also without calling it.
func sleeps(t *testing.T, path string, b []byte) (at []token.Position) {
	t.Helper()
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, path, b, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	name := "" // of the package time in this file
	for _, imp := range f.Imports {
		if imp.Path.Value == `"time"` {
			name = "time"
			if imp.Name != nil {
				name = imp.Name.Name
			}
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "Sleep" {
			if x, ok := s.X.(*ast.Ident); ok && x.Name == name {
				at = append(at, files.Position(s.Pos()))
			}
		}
		return true
	})
	return at
}

func TestSleepsAreFound(t *testing.T) {
	for src, want := range map[string]int{
		"import \"time\"\nfunc f() { time.Sleep(1) }":                  1,
		"import clock \"time\"\nvar nap = clock.Sleep":                 1,
		"import \"time\"\nfunc f(x c) { x.Sleep(1); time.Now() }":      0,
		"import \"time\"\n// time.Sleep is not for tests.\nvar _ = 1":  0,
		"import \"time\"\nfunc f() { for ; ; time.Sleep(1) { } }\n":    1,
		"import \"testing\"\nvar time c\nfunc f() { time.Sleep(1) }\n": 0,
		"import \"time\"\nfunc f() { time.Sleep(1); time.Sleep(2) }\n": 2,
	} {
		if got := sleeps(t, "a_test.go", []byte("package a\n"+src)); len(got) != want {
			t.Errorf("%q: %v, want %d", src, got, want)
		}
	}
}

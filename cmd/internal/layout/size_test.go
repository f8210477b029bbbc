package layout

import (
	"bufio"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	mostColumns  = 130
	tabColumns   = 4
	mostFunction = 60  // lines
	mostFile     = 500 // lines
)

// sizeRoot is the folder of the module.
const sizeRoot = "../../.."

// productFiles calls f for each Go file of the product: not for tests and what they generate.
func productFiles(t *testing.T, root string, f func(path string)) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || path != root && strings.HasPrefix(d.Name(), ".")):
			return filepath.SkipDir
		case !d.IsDir() && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go"):
			seen++
			f(path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if root == sizeRoot && seen < 100 {
		t.Fatalf("only %d files were found", seen)
	}
}

// TestSizes: what a reader has to keep in mind, and on the screen, at a time is bounded.
func TestSizes(t *testing.T) {
	productFiles(t, sizeRoot, func(path string) {
		for _, fault := range tooLarge(t, path) {
			t.Errorf("%s", fault)
		}
	})
}

// tooLarge returns what is too long, or too wide, in a file.
func tooLarge(t *testing.T, path string) (faults []string) {
	t.Helper()
	name := strings.TrimPrefix(path, sizeRoot+"/")
	files := token.NewFileSet()
	parsed, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	fault := func(line int, what string) {
		faults = append(faults, name+":"+strconv.Itoa(line)+": "+what)
	}
	for _, d := range parsed.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		from, to := files.Position(f.Pos()).Line, files.Position(f.End()).Line
		if n := to - from + 1; n > mostFunction {
			fault(from, f.Name.Name+" has "+strconv.Itoa(n)+" lines: cut it at a seam")
		}
	}
	tags := tagLines(files, parsed)
	lines := readLines(t, path)
	for line, text := range lines {
		if n := columns(text); n > mostColumns && !tags[line+1] {
			fault(line+1, strconv.Itoa(n)+" columns: break the line")
		}
	}
	if n := len(lines); n > mostFile {
		fault(n, "the file is too long: one file, one concern")
	}
	return faults
}

// tagLines returns the lines with struct tags, which cannot be broken: a tag is one literal, and package reflect takes
// no line breaks in it.
func tagLines(files *token.FileSet, f *ast.File) map[int]bool {
	lines := map[int]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		if field, ok := n.(*ast.Field); ok && field.Tag != nil {
			lines[files.Position(field.Tag.Pos()).Line] = true
		}
		return true
	})
	return lines
}

func columns(line string) int {
	return utf8.RuneCountInString(line) + strings.Count(line, "\t")*(tabColumns-1)
}

func readLines(t *testing.T, path string) (lines []string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		lines = append(lines, in.Text())
	}
	if err := in.Err(); err != nil {
		t.Fatal(err)
	}
	return lines
}

// The check itself finds what it is for, and leaves alone what cannot be broken.
func TestSizesFindsFaults(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.go")
	long := "package x\n\nfunc f() {\n" + strings.Repeat("\t_ = 1\n", mostFunction-1) + "}\n\n" +
		"var v = \"" + strings.Repeat("x", mostColumns) + "\"\n\n" +
		"type t struct {\n\tA int `json:\"" + strings.Repeat("a", mostColumns) + "\"`\n}\n"
	if err := os.WriteFile(path, []byte(long), 0o600); err != nil {
		t.Fatal(err)
	}
	faults := tooLarge(t, path)
	if len(faults) != 2 || !strings.Contains(faults[0], "f has 61 lines") || !strings.Contains(faults[1], "140 columns") {
		t.Errorf("%q", faults)
	}
	if err := os.WriteFile(path, []byte("package x\n"+strings.Repeat("\n", mostFile)), 0o600); err != nil {
		t.Fatal(err)
	}
	if faults := tooLarge(t, path); len(faults) != 1 || !strings.Contains(faults[0], "the file is too long") {
		t.Errorf("%q", faults)
	}
}

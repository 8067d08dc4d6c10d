//! Documents from parquet shards, row group by row group, without Python.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::count::{Documents, first_chars};
use crate::split::one_line;

/// Values of a column that are decoded at a time.
const RECORDS: usize = 1024;

/// A parquet file with a text column.
pub struct Shard {
    path: PathBuf,
    /// Number of the text column.
    column: usize,
    /// How many row groups there are.
    pub groups: usize,
}

impl Shard {
    /// The error is one line that names the file.
    pub fn open(path: &Path, column: &str) -> Result<Self, String> {
        let name = path.display();
        let reader = open(path).map_err(|error| format!("{name}{error}"))?;
        let schema = reader.metadata().file_metadata().schema_descr();
        let found = schema.columns().iter().position(|described| described.path().string() == column);
        let Some(found) = found else {
            let names: Vec<_> = schema.columns().iter().map(|described| described.path().string()).collect();
            return Err(format!("{name} has no column {column:?}; it has {}", names.join(", ")));
        };
        let described = schema.column(found);
        if described.physical_type() != Type::BYTE_ARRAY || described.max_rep_level() > 0 {
            let kind =
                if described.max_rep_level() > 0 { "lists".into() } else { described.physical_type().to_string() };
            return Err(format!("column {column:?} of {name} holds {kind}, not text"));
        }
        Ok(Shard { path: path.to_owned(), column: found, groups: reader.num_row_groups() })
    }

    /// The documents of a row group, each cut after `doc_cap` characters; empty ones and nulls are left out.
    pub fn read(&self, group: usize, doc_cap: usize) -> Result<Documents, String> {
        self.documents(group, doc_cap).map_err(|error| format!("{}, row group {group}: {error}", self.path.display()))
    }

    fn documents(&self, group: usize, doc_cap: usize) -> Result<Documents, String> {
        let say = |error: parquet::errors::ParquetError| one_line(&error);
        // A reader of its own: clones of a file share one position, and threads would move it under each other. The
        // footer that is read again is some 50 KB for a shard of 50 row groups.
        let reader = open(&self.path)?;
        let group = reader.get_row_group(group).map_err(say)?;
        let ColumnReader::ByteArrayColumnReader(mut column) = group.get_column_reader(self.column).map_err(say)? else {
            return Err("its text column is of another type than the schema says".into());
        };
        let mut documents = Documents::default();
        let (mut values, mut levels): (Vec<ByteArray>, Vec<i16>) = (Vec::new(), Vec::new());
        loop {
            values.clear();
            levels.clear(); // of definition: values holds no nulls, so they need no looking at
            let (records, ..) = column.read_records(RECORDS, Some(&mut levels), None, &mut values).map_err(say)?;
            if records == 0 {
                return Ok(documents);
            }
            for value in &values {
                let text =
                    std::str::from_utf8(value.data()).map_err(|error| format!("a text is not UTF-8: {error}"))?;
                let text = first_chars(text, doc_cap).0;
                if !text.is_empty() {
                    documents.push(text);
                }
            }
        }
    }
}

fn open(path: &Path) -> Result<SerializedFileReader<File>, String> {
    let file = File::open(path).map_err(|error| format!(": {}", one_line(&error)))?;
    SerializedFileReader::new(file).map_err(|error| format!(" is not a parquet file: {}", one_line(&error)))
}

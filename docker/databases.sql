-- beside MLflow's, which POSTGRES_DB names
CREATE DATABASE prefect;
CREATE DATABASE requests;
